"""What drafts are worth: against a search without shortcuts, and in text that is copied in runs."""

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quasar_core.decode.costs.pass_costs import Cost, PassCost
from quasar_core.decode.policy.draft_values import worths_at_target, worths_of_rest

FLAT_THEN_STEEP = PassCost((1, 4, 8, 16, 33), (6.8, 7.2, 9.6, 18.5, 42.0))
LINEAR = PassCost((1, 33), (7.0, 39.0))
CHANCES = st.lists(st.floats(0.0, 1.0), max_size=7)


def worth_of_rest(chances: Sequence[float], confirm: Cost, rate: float) -> float:
    """The best of all ways to pass a draft, or none of it: each pass checks some tokens, and goes on behind its own."""
    found = 0.0
    for length in range(len(chances) + 1 if chances else 0):
        reached = [1.0, *accumulate(chances, mul)]
        worth = sum(reached[: length + 1]) - rate * confirm(1 + length)
        if length < len(chances):
            worth += reached[length + 1] * worth_of_rest(chances[length + 1 :], confirm, rate)
        found = max(found, worth)
    return found


@given(CHANCES, st.floats(0.0, 0.4))
def test_a_rest_is_worth_the_best_of_all_ways_to_pass_it(chances: list[float], rate: float) -> None:
    rests = worths_of_rest(chances, FLAT_THEN_STEEP, rate)
    assert len(rests) == len(chances) + 2
    for done in range(1, len(chances)):
        assert rests[done] == pytest.approx(worth_of_rest(chances[done:], FLAT_THEN_STEEP, rate))
    assert not any(rests[len(chances) :])


@given(CHANCES, st.floats(0.0, 0.4), st.integers(0, 9), st.floats(0.01, 1.0))
def test_a_pass_is_worth_its_tokens_less_its_time_and_what_it_leaves(
    chances: list[float], rate: float, window: int, survival: float
) -> None:
    worths = worths_at_target(window, survival, chances, FLAT_THEN_STEEP, rate)
    reached = [survival * chance for chance in accumulate([1.0, *chances], mul)]
    for length, worth in enumerate(worths):
        alone = 1 + sum(reached[1 : length + 1]) - rate * FLAT_THEN_STEEP(window + 1 + length)
        rest = worth_of_rest(chances[length + 1 :], FLAT_THEN_STEEP, rate) if length + 1 < len(chances) else 0.0
        left = reached[length + 1] * rest if length < len(chances) else 0.0
        assert worth == pytest.approx(alone + left)


def rate_of(length: int, chance: float, confirm: Cost) -> float:
    """Tokens per second of copied runs, so many tokens of which each pass checks; then comes a pass without a draft."""
    passes = 1 / (1 - chance ** (length + 1))  # of a run, which ends at its first wrong token
    tokens = passes * sum(chance**i for i in range(length + 1)) + 1
    return tokens / (passes * confirm(1 + length) + confirm(1))


@pytest.mark.parametrize("confirm", [FLAT_THEN_STEEP, LINEAR], ids=["flat then steep", "linear"])
@pytest.mark.parametrize("chance", [0.6, 0.9, 0.97])
def test_where_copied_text_comes_in_runs_the_length_is_about_the_best(chance: float, confirm: Cost) -> None:
    rates = [rate_of(length, chance, confirm) for length in range(16)]
    worths = worths_at_target(0, 1.0, [chance] * 30, confirm, 0.15)[:16]
    assert rates[worths.index(max(worths))] >= 0.97 * max(rates)


def test_what_is_left_counts() -> None:
    """Without it tokens less the worth of time are most for drafts of 15, which are slower."""
    alone = [sum(0.97**i for i in range(k + 1)) - 0.15 * FLAT_THEN_STEEP(k + 1) for k in range(16)]
    assert alone.index(max(alone)) == 15
    assert rate_of(15, 0.97, FLAT_THEN_STEEP) < 0.95 * max(rate_of(k, 0.97, FLAT_THEN_STEEP) for k in range(16))


def test_a_flat_pass_takes_all_of_a_draft() -> None:
    """Nothing is left for later where a token more costs nothing."""
    worths = worths_at_target(3, 0.8, [0.9] * 15, PassCost((1,), (7.0,)), 0.15)
    assert worths.index(max(worths)) == 15
