"""Which of the two ways of a prompt's pass is the faster, told from their times."""

from pathlib import Path

import pytest
import torch
from helpers.decoder_cases import CASES, CPU, save_model

from quasar_core.models.loading import attach
from quasar_core.models.weights.lean_weights import load_target
from tools.measure_prompts import CPP, TORCH, longest_in_cpp, measure


@pytest.mark.parametrize(("faster", "longest"), [((1, 8, 33), 33), ((1, 33), 1), ((), 0)])
def test_the_longest_is_the_one_before_the_first_that_is_slower(faster: tuple[int, ...], longest: int) -> None:
    found = {size: {CPP: 1.0 if size in faster else 2.0, TORCH: 1.5} for size in (33, 1, 8)}
    assert longest_in_cpp(found) == longest


@pytest.mark.usefixtures("cpp_pass")
def test_both_ways_are_timed(tmp_path: Path) -> None:
    save_model(tmp_path, *CASES["llama"])
    decoder, taken = load_target(tmp_path, CPU, torch.bfloat16), list[int]()
    attach(decoder)
    plain = decoder._plain_pass
    decoder._plain_pass = lambda tokens, *more: taken.append(len(tokens)) or plain(tokens, *more)  # type: ignore
    found = measure(decoder, (2, 5), rounds=2)
    assert sorted(taken) == [2] * 3 + [5] * 3  # one to warm up
    assert all(seconds > 0 for ways in found.values() for seconds in ways.values())
