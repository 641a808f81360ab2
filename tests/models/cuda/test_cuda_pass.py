"""The recorded pass computes what the plain one computes: its steps, unrecorded, on the CPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import (
    CASES,
    CPU,
    FLOAT,
    LENGTH,
    assert_close,
    fresh_logits,
    in_passes,
    random_tokens,
    recorded_cases,
    save_model,
)
from helpers.quantized_decoder import mixed_bits, quantize_layers
from helpers.tiny_models import generate, make_pair

from quasar_core.config import SamplingConfig
from quasar_core.decode.logits.sampling import accept_matching
from quasar_core.models.base import NO_TOKEN, choose_best, likeliest_tokens
from quasar_core.models.cuda.choose import why_not
from quasar_core.models.cuda.graph_pass import CudaPass, pass_size
from quasar_core.models.cuda.torch_steps import TorchSteps, length_bucket
from quasar_core.models.decoder.layer import DenseLinear
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.weights.lean_weights import attach_verifier, load_target


def recorded(decoder: LeanDecoder, **options: Any) -> LeanDecoder:
    """The decoder with the steps of its CUDA passes, launched plainly."""
    decoder.fast = CudaPass(decoder, TorchSteps(), **options)
    return decoder


@pytest.fixture(scope="module", params=recorded_cases("experts"))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LeanDecoder, torch.Tensor]:
    """A decoder whose short passes are recorded ones, and transformers' logits of `random_tokens()`."""
    folder = tmp_path_factory.mktemp("case")
    model = save_model(folder, *CASES[request.param])
    return recorded(load_target(folder, CPU, FLOAT)), fresh_logits(model, random_tokens())


@pytest.mark.parametrize("sizes", [[1, 1, 1, 30, 1], [2, 16, 1, 7, 3], [5, 40]], ids=str)
def test_logits_equal_those_of_transformers(case: tuple[LeanDecoder, torch.Tensor], sizes: list[int]) -> None:
    decoder, expected = case
    assert_close(in_passes(decoder, random_tokens(), sizes), expected)


def test_logits_after_rollbacks_equal_those_of_a_fresh_text(case: tuple[LeanDecoder, torch.Tensor]) -> None:
    decoder, expected = case
    tokens, cache = random_tokens(), decoder.new_cache(LENGTH)
    decoder.forward([*tokens[:20], 5, 6, 7], cache)
    cache.rollback(20)
    decoder.forward([9], cache)
    cache.rollback(3)
    decoder.forward(tokens[3:30], cache)
    cache.rollback(30)
    assert_close(decoder.forward(tokens[30:], cache), expected[30:])


def test_passes_on_both_sides_of_a_bucket_equal_plain_ones(tmp_path: Path) -> None:
    options = {"max_position_embeddings": 2048, "num_hidden_layers": 2, "sliding_window": 300}
    save_model(tmp_path, "Mistral", options)
    plain, fast = load_target(tmp_path, CPU, FLOAT), recorded(load_target(tmp_path, CPU, FLOAT))
    tokens = random_tokens(1530)
    for start in (1015, 1018, 1021, 1024, 1500):
        caches = [model.new_cache(1600) for model in (plain, fast)]
        logits = []
        for model, cache in zip((plain, fast), caches, strict=True):
            model.forward(tokens[:start], cache, last_only=True)
            logits.append(model.forward(tokens[start : start + 6], cache))
        assert_close(logits[1], logits[0])


def test_target_and_verifier_share_a_cache(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_model(source, "Qwen2", {})
    checkpoint = quantize_layers(source, tmp_path / "codes", mixed_bits)
    logits: dict[bool, torch.Tensor] = {}
    for fast in (False, True):
        target = load_target(source, CPU, FLOAT)
        verifier = attach_verifier(target, checkpoint, "dense")
        models = [recorded(target), recorded(verifier)] if fast else [target, verifier]
        logits[fast] = take_turns(models, random_tokens())
    assert_close(logits[True], logits[False])


def take_turns(models: Sequence[LeanDecoder], tokens: Sequence[int]) -> torch.Tensor:
    """The target reads a prompt, then verifier and target pass the same tokens in turn, over one cache."""
    target, verifier = models
    cache = target.new_cache(LENGTH)
    target.forward(tokens[:10], cache)
    logits = []
    for start, end in ((10, 14), (14, 15), (15, 31)):
        logits.append(verifier.forward(tokens[start:end], cache))
        cache.rollback(start)
        logits.append(target.forward(tokens[start:end], cache))
    return torch.cat(logits)


def test_logits_stay_when_the_next_pass_runs(tmp_path: Path) -> None:
    save_model(tmp_path, "Llama", {})
    decoder = recorded(load_target(tmp_path, CPU, FLOAT))
    cache = decoder.new_cache(LENGTH)
    first = decoder.forward([3, 4, 5], cache)
    before = first.clone()
    decoder.forward([6, 7, 8], cache)
    assert torch.equal(first, before)


def test_what_a_new_cache_holds_does_not_matter(tmp_path: Path) -> None:
    model = save_model(tmp_path, "Llama", {})
    decoder, tokens = recorded(load_target(tmp_path, CPU, FLOAT)), random_tokens(20)
    cache = decoder.new_cache(64)
    decoder.fast, fast = None, decoder.fast
    decoder.forward(tokens[:12], cache)
    for states in cache.layers:
        states[:, :, 12:] = torch.nan
    decoder.fast = fast
    assert_close(decoder.forward(tokens[12:], cache), fresh_logits(model, tokens)[12:])


@pytest.mark.parametrize("drafted", range(8))
def test_choices_made_in_a_pass_are_those_of_its_logits(tmp_path: Path, drafted: int) -> None:
    """Token, margin, and how many tokens of a draft are confirmed that differs from the choices at any place."""
    save_model(tmp_path, "Qwen3", {})
    decoder, tokens = recorded(load_target(tmp_path, CPU, FLOAT)), random_tokens(10)
    cache = decoder.new_cache(LENGTH)
    decoder.forward(tokens, cache, last_only=True)
    right = [9]
    for _ in range(drafted):
        right += choose_best(decoder.forward(right[-1:], cache)).tokens
    for differs in range(drafted + 1):
        offered = [*right[: 1 + differs], *[token ^ 1 for token in right[1 + differs :]]]
        cache.rollback(10)
        logits = decoder.forward(offered, cache)
        expected = choose_best(logits)
        cache.rollback(10)
        found = decoder.choose(offered, cache, 5)
        assert found.tokens == expected.tokens
        assert found.likeliest == likeliest_tokens(logits, 5)
        assert found.margins == pytest.approx(expected.margins)
        assert found.accepted == accept_matching(expected.tokens, offered[1:])[0] == differs
        assert cache.length == 10 + len(offered)


def test_tokens_that_fill_up_a_pass_are_not_accepted(tmp_path: Path) -> None:
    """All logits are equal, so token 0 is chosen everywhere, and is what fills the pass up."""
    save_model(tmp_path, "Llama", {})
    decoder = recorded(load_target(tmp_path, CPU, FLOAT))
    decoder.head.weight.zero_()  # type: ignore[union-attr]
    for count in (1, 3, 4, 5):
        found = decoder.choose([0] * count, decoder.new_cache(LENGTH))
        assert (found.accepted, found.tokens, found.margins) == (count - 1, [0] * count, [0.0] * count)


def test_a_longer_pass_is_several_recorded_ones(tmp_path: Path) -> None:
    save_model(tmp_path, "Llama", {})
    decoder = recorded(load_target(tmp_path, CPU, FLOAT))
    decoder._plain_pass = None  # type: ignore[method-assign, assignment]
    tokens, cache = random_tokens(100), decoder.new_cache(100)
    expected = in_passes(decoder, tokens, [25])
    assert_close(decoder.forward(tokens, cache), expected)
    cache.rollback(0)
    found = decoder.choose(tokens, cache)
    assert (found.tokens, found.accepted) == (choose_best(expected).tokens, None)


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_yield_no_token_and_confirm_nothing(tmp_path: Path, odd: float) -> None:
    save_model(tmp_path, "Llama", {})
    decoder = recorded(load_target(tmp_path, CPU, FLOAT))
    decoder.head = DenseLinear(decoder.head.weight, torch.zeros(96))  # type: ignore[union-attr]
    decoder.head.bias[0] = odd
    found = decoder.choose([0] * 3, decoder.new_cache(LENGTH))
    assert (found.tokens, found.accepted) == ([NO_TOKEN] * 3, 0)


def test_greedy_decoding_reads_no_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every mode the text is the one that plain passes yield, by the device's own counts."""
    source = tmp_path / "source"
    save_model(source, "Qwen2", {})
    checkpoint = quantize_layers(source, tmp_path / "codes", mixed_bits)
    texts: dict[bool, list[list[int]]] = {}
    for fast in (False, True):
        target = load_target(source, CPU, FLOAT)
        verifier = attach_verifier(target, checkpoint, "dense")
        if fast:
            monkeypatch.setattr(CudaPass, "run", lambda *given: pytest.fail("logits were read"))
            recorded(target), recorded(verifier)
        pair = make_pair(target, verifier)
        texts[fast] = [generate(pair, verify, 3, 4).token_ids for verify in ("full", "exact", "quantized")]
    assert texts[True] == texts[False]


def test_a_penalty_or_sampling_reads_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path, "Llama", {})
    plain, fast = load_target(tmp_path, CPU, FLOAT), recorded(load_target(tmp_path, CPU, FLOAT))
    monkeypatch.setattr(CudaPass, "choose", lambda *given: pytest.fail("the logits must be changed first"))
    for sampling in (SamplingConfig(repetition_penalty=1.4), SamplingConfig(temperature=0.8, seed=3)):
        texts = [generate(make_pair(model), "full", 3, sampling=sampling).token_ids for model in (plain, fast)]
        assert texts[0] == texts[1]


class RecordingLauncher:
    """In the place of graphs: remembers the first launch of a kind with everything it closed over, and repeats that."""

    def __init__(self) -> None:
        self.launches: dict[Any, Any] = {}

    def run(self, owner: Any, kind: Any, launch: Any) -> None:
        self.launches.setdefault((id(owner), kind), launch)()


def test_a_launch_serves_every_position_of_its_bucket(tmp_path: Path) -> None:
    """What a graph repeats is the first launch: nothing in it may depend on where that one stood."""
    model = save_model(tmp_path, *CASES["mistral, window"])
    launches = RecordingLauncher()
    decoder = recorded(load_target(tmp_path, CPU, FLOAT), launches=launches)
    logits = in_passes(decoder, random_tokens(), [4, 1])
    assert len(launches.launches) == 2
    assert_close(logits, fresh_logits(model, random_tokens()))


def test_lengths_are_bounded_by_buckets_and_the_capacity() -> None:
    assert [length_bucket(n, 9000) for n in (1, 1024, 1025, 4096, 4097)] == [1024, 1024, 4096, 4096, 9000]
    assert length_bucket(3, 45) == 45


def test_passes_are_filled_up_to_the_sizes_that_are_recorded(tmp_path: Path) -> None:
    assert [pass_size(n, 100) for n in (1, 3, 5, 16, 17, 25, 40)] == [1, 4, 8, 16, 24, 40, 40]
    assert [pass_size(n, 7) for n in (3, 5, 7)] == [4, 5, 7]  # where the cache ends
    model = save_model(tmp_path, "Llama", {})
    launches = RecordingLauncher()
    decoder = recorded(load_target(tmp_path, CPU, FLOAT), launches=launches)
    logits = in_passes(decoder, random_tokens(), [3, 4, 3, 5, 7, 6, 8, 5, 3, 1])
    assert sorted(size for _, (size, *_) in launches.launches) == [1, 4, 8]
    assert_close(logits, fresh_logits(model, random_tokens()))


def test_what_cannot_be_recorded_is_said(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_model(source, "Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}})
    target = load_target(source, CPU, FLOAT)
    assert "where a pass ends" in str(why_not(target))
    save_model(tmp_path / "plain", "Llama", {})
    target = load_target(tmp_path / "plain", CPU, FLOAT)
    verifier = attach_verifier(target, quantize_layers(tmp_path / "plain", tmp_path / "c", lambda _: 4), "reference")
    assert why_not(target) is None
    assert "dequantizes" in str(why_not(verifier))
