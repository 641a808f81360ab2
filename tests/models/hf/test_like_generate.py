"""What runs through transformers writes what its own greedy `generate` writes, with drafts and without."""

import random
from pathlib import Path
from typing import Any

import pytest
from helpers.families import QUANTIZED, RECURRENT, UNUSUAL, greedy, save_family

from quasar_core.api import decoding
from quasar_core.config import GenerationConfig
from quasar_core.decode.generator import Generator

# Learned positions; ALiBi; parallel blocks; positions that the class itself would count otherwise.
BY_POSITION = {name: QUANTIZED[name] for name in ("opt", "bloom", "mpt", "gptneox", "phi", "falcon")} | UNUSUAL
LENGTH = 16


def prompts() -> list[list[int]]:
    """Ten of random lengths; half of them repeat themselves, so that there is something to draft."""
    luck = random.Random(3)
    texts = [[luck.randrange(1, 264) for _ in range(luck.randint(1, 30))] for _ in range(10)]
    return [text * (1 + number % 2) for number, text in enumerate(texts)]


def check(folder: Path, expected: list[list[int]], draft: str) -> int:
    """Every prompt by one generator; the number of drafted tokens that were kept."""
    pair = decoding.load_pair(str(folder), verify="full", draft=draft, device="cpu", dtype="float32")  # type: ignore
    assert any(note.startswith("decoder: transformers") for note in pair.notes)
    config = GenerationConfig(LENGTH, "full", draft, num_draft_tokens=3, ignore_eos=True)  # type: ignore[arg-type]
    generator, kept = Generator(pair, config), 0
    for ids, text in zip(prompts(), expected, strict=True):
        result = generator.generate(ids)
        assert list(result.token_ids) == text
        kept += LENGTH - 1 - result.stats.steps
    return kept


def texts_of(model: Any) -> list[list[int]]:
    """What `generate` writes behind each prompt."""
    return [greedy(model, ids, LENGTH) for ids in prompts()]


@pytest.mark.parametrize("name", BY_POSITION)
def test_a_family_that_goes_back_writes_what_generate_writes(name: str, tmp_path: Path) -> None:
    expected = texts_of(save_family(tmp_path / "m", BY_POSITION[name]))
    assert check(tmp_path / "m", expected, "none") == 0
    assert check(tmp_path / "m", expected, "ngram") > 0


@pytest.mark.parametrize("name", RECURRENT)
def test_a_family_with_a_state_writes_plainly_what_generate_writes(name: str, tmp_path: Path) -> None:
    expected = texts_of(save_family(tmp_path / "m", RECURRENT[name]))
    assert check(tmp_path / "m", expected, "none") == 0
