"""Spending a budget of bytes: against all choices tried."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.quantize.mixed_precision import Choice, allocate, lower_hull


def choice(size: int, cost: float) -> Choice:
    return Choice(bits=4, group_size=128, size=size, cost=cost)


def test_the_hull_leaves_out_what_no_price_of_a_byte_makes_best() -> None:
    options = [choice(10, 8), choice(20, 7.5), choice(30, 2), choice(40, 3), choice(50, 1)]
    assert [(c.size, c.cost) for c in lower_hull(options)] == [(10, 8), (30, 2), (50, 1)]


def test_bytes_go_where_they_save_most() -> None:
    """A step of `a` saves 5 for 10 bytes, one of `b` 3 for 5: `b` first, then nothing is left for `a`."""
    options = {"a": [choice(10, 6), choice(20, 1)], "b": [choice(10, 4), choice(15, 1)]}
    assert {name: c.size for name, c in allocate(options, 29).items()} == {"a": 10, "b": 15}
    assert {name: c.size for name, c in allocate(options, 35).items()} == {"a": 20, "b": 15}


def test_a_budget_below_the_smallest_choices_is_refused() -> None:
    with pytest.raises(ValueError, match="take 20 bytes, and the budget is 19"):
        allocate({"a": [choice(10, 1)], "b": [choice(10, 1), choice(12, 0)]}, 19)


@settings(max_examples=60, deadline=None)
@given(
    layers=st.lists(
        st.lists(st.tuples(st.integers(1, 30), st.floats(0, 10)), min_size=1, max_size=4), min_size=1, max_size=4
    ),
    spare=st.integers(0, 60),
)
def test_no_other_allocation_on_the_hulls_is_better_by_more_than_a_step(
    layers: list[list[tuple[int, float]]], spare: int
) -> None:
    options = {str(i): [choice(*pair) for pair in pairs] for i, pairs in enumerate(layers)}
    smallest = sum(lower_hull(choices)[0].size for choices in options.values())
    budget = smallest + spare
    taken = allocate(options, budget)
    assert sum(c.size for c in taken.values()) <= budget
    fitting = [
        sum(c.cost for c in chosen)
        for chosen in itertools.product(*options.values())
        if sum(c.size for c in chosen) <= budget
    ]
    hulls = [lower_hull(choices) for choices in options.values()]
    step = max((a.cost - b.cost for hull in hulls for a, b in itertools.pairwise(hull)), default=0.0)
    assert sum(c.cost for c in taken.values()) <= min(fitting) + step + 1e-9
