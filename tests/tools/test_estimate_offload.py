"""Estimates of streaming to a GPU are the plan's arithmetic."""

import pytest

from tools.estimate_offload import CASES, Case, estimate, page
from tools.measure_offload import most_gained

BLOCK_8B = 2 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 12_288)


def test_a_confirm_copies_what_does_not_fit() -> None:
    """Of Qwen3-8B's blocks of 386 MB, whatever the link."""
    found, slower = estimate(CASES[0], 25e9), estimate(CASES[0], 5e9)
    moved = len(found.plan.streamed)
    assert 2 < moved < 36
    assert found.moved == moved * BLOCK_8B
    assert found.confirm == pytest.approx(moved * BLOCK_8B / 25e9)
    assert slower.confirm == pytest.approx(5 * found.confirm)
    assert found.plan.held <= 16e9 - 700e6
    assert found.plan.held + BLOCK_8B > 16e9 - 700e6
    assert found.verify == pytest.approx((36 * BLOCK_8B / 2 * 4.125 / 8 + 2 * 151_936 * 4096) / 0.8 / 7e11, rel=1e-3)
    assert found.exact(0.95) == pytest.approx(found.plain * most_gained(0.95, found.confirm / found.verify))
    assert found.exact(0.91) < found.exact(0.98)


def test_a_fast_link_is_not_faster_than_the_gpu_reads() -> None:
    found = estimate(CASES[0], 1e15)
    assert found.confirm == pytest.approx(16.4e9 / 0.8 / 7e11, rel=0.01)


def test_the_27b_has_as_many_weights_as_it_is_named_for() -> None:
    case = CASES[1]
    found = estimate(Case(case.name, case.shape, 200 * 10**9, case.bandwidth), 25e9)
    assert found.confirm * 0.8e12 / 2 == pytest.approx(27.0e9, rel=0.01)


def test_the_page_says_that_nothing_was_measured() -> None:
    lines = list(page(25e9))
    assert lines[0] == "Estimates by counts over a link of 25 GB/s; nothing of them was measured."
    assert len(lines) == 4 + len(CASES)
    assert all(line.count("|") == 10 for line in lines[2:])
