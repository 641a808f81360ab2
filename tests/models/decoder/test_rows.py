"""Several texts that march in step through the lean decoder get the logits that each gets by itself."""

from pathlib import Path

import pytest
import torch
from helpers.decoder_cases import (
    CASES,
    CPU,
    DYNAMIC,
    FLOAT,
    assert_close,
    fresh_logits,
    in_passes,
    random_tokens,
    recorded_cases,
    relative_error,
    save_model,
)

from quasar_core.errors import QuasarError
from quasar_core.models.decoder import rows
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.decoder.rows import RowsCache, pass_rows, text_bytes
from quasar_core.models.hf import causal_lm
from quasar_core.models.weights.lean_weights import load_target

STEPS = 20  # past every window of the cases
pytestmark = pytest.mark.usefixtures("_often_grown")


@pytest.fixture
def _often_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "GROWTH", 3)


def texts(count: int, length: int = STEPS) -> list[list[int]]:
    return [random_tokens(length, seed) for seed in range(1, count + 1)]


def new_cache(decoder: LeanDecoder, count: int, capacity: int = STEPS) -> RowsCache:
    return RowsCache(decoder.config.blocks, count, capacity, decoder.device, decoder.dtype)


def in_step(decoder: LeanDecoder, written: list[list[int]], cache: RowsCache | None = None) -> torch.Tensor:
    """Logits [B, T, V] of the texts, passed a token of each at a time."""
    cache = cache or new_cache(decoder, len(written), len(written[0]))
    columns = torch.tensor(written).unbind(dim=1)[cache.length :]
    return torch.stack([pass_rows(decoder, tokens, cache) for tokens in columns], dim=1)


@pytest.mark.parametrize("case", recorded_cases())
def test_each_text_gets_transformers_logits_of_it_alone(case: str, tmp_path: Path) -> None:
    model = save_model(tmp_path, *CASES[case])
    found = in_step(load_target(tmp_path, CPU, FLOAT), texts(2))
    for text, logits in zip(texts(2), found, strict=True):
        assert_close(logits, fresh_logits(model, text), case)


def test_beyond_the_limit_of_dynamic_scaling_a_token_is_rotated_as_the_text_that_ends_with_it(tmp_path: Path) -> None:
    save_model(tmp_path, "Llama", {"max_position_embeddings": 12, "rope_parameters": DYNAMIC})
    found = in_step(load_target(tmp_path, CPU, FLOAT), texts(2))
    for text, logits in zip(texts(2), found, strict=True):
        assert_close(logits, in_passes(causal_lm.load_target(tmp_path, CPU, FLOAT), text, [1]))


def test_in_bfloat16_the_logits_are_those_of_one_text_within_its_rounding(tmp_path: Path) -> None:
    save_model(tmp_path, "Qwen3", {"head_dim": 32})
    decoder = load_target(tmp_path, CPU, torch.bfloat16)
    found = in_step(decoder, texts(5))
    for text, logits in zip(texts(5), found, strict=True):
        assert relative_error(logits, in_passes(decoder, text, [1])) < 8 * 2**-8


@pytest.mark.parametrize("case", ["llama", "gemma 4, shared states and own inputs"])
def test_states_that_were_taken_out_go_on_as_the_texts_did(case: str, tmp_path: Path) -> None:
    save_model(tmp_path, *CASES[case])
    decoder = load_target(tmp_path, CPU, FLOAT)
    first = new_cache(decoder, 3)
    expected = in_step(decoder, texts(3), first)
    second = new_cache(decoder, 3)
    for begin, end in ((0, 5), (5, 12)):
        second.append({name: part.clone() for name, part in first.states(begin, end).items()})
    second.rollback(11)
    assert torch.equal(in_step(decoder, texts(3), second), expected[:, 11:])
    assert text_bytes(decoder.config.blocks, STEPS, 4) * 3 == sum(
        part.numel() * 4 for part in first.states(0, STEPS).values()
    )


def test_a_cache_that_is_full_or_shorter_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, *CASES["llama"])
    decoder = load_target(tmp_path, CPU, FLOAT)
    cache = new_cache(decoder, 2)
    in_step(decoder, texts(2), cache)
    with pytest.raises(QuasarError, match="The cache holds 20 tokens of a text, and 21 are needed"):
        pass_rows(decoder, torch.tensor([3, 4]), cache)
    with pytest.raises(ValueError, match="cannot move a cache of 20 positions to 21"):
        cache.rollback(21)
