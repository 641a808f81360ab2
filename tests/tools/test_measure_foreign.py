"""Models that run through transformers, beside its own `generate`: figures from times, and that both are compared."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_model import save_tiny_model

from tools.foreign_families import FAMILIES, build_family, save_family
from tools.measure_foreign import Answer, Ratio, line, measure

OPTIONS: Any = SimpleNamespace(prompt_tokens=9, tokens=5, rounds=2)
TINY = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 300}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_the_size_of_a_real_small_model(name: str) -> None:
    with torch.device("meta"):
        model = build_family(name)
    assert 100e6 < sum(parameter.numel() for parameter in model.parameters()) < 200e6


def test_ratios_are_of_times_of_the_same_round() -> None:
    ratio = Ratio.of([2.0, 30.0, 3.0], [1.0, 10.0, 3.0])
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 1.5, 2.5)
    assert str(ratio) == "2.000 (1.500–2.500)"


def test_seconds_a_token_are_of_those_behind_the_first() -> None:
    answer = Answer([1, 2, 3], first_s=5.0, decode_s=4.0)
    assert (answer.per_token, answer.whole) == (2.0, 9.0)


def test_both_ways_write_the_same_tokens_and_are_timed(tmp_path: Path) -> None:
    found = measure(OPTIONS, save_family(tmp_path, "gpt2", **TINY), "gpt2", "float32")
    assert found.same_tokens
    assert found.ours_s > 0
    assert found.theirs_s > 0
    assert line(found).endswith("equal")


def test_texts_that_differ_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Answer([1] * OPTIONS.tokens, 1.0, 1.0)
    monkeypatch.setattr("tools.measure_foreign.answer_by_quasar", lambda *_: wrong)
    found = measure(OPTIONS, save_family(tmp_path, "gpt2", **TINY), "gpt2", "float32")
    assert line(found).endswith("DIFFER")


def test_what_our_own_decoder_runs_is_not_compared(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="does not run through transformers"):
        measure(OPTIONS, save_tiny_model(tmp_path), "tiny", "float32")
