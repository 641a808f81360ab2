"""Timing by clocks that are made by hand: when repeating ends, what counts as the time, what is refused."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from quasar_core.system import Load
from quasar_core.timing import LEAST, Timing, time_in_turn, timed


class Clock:
    """Moves when something is done."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def sampler(self, cost: Callable[[], float]) -> Callable[[], float]:
        def work() -> None:
            self.seconds += cost()

        return timed(work, self)


class Meter:
    def read(self) -> Load:
        return Load(0.5)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_time_is_the_first_quartile_and_the_spread_that_of_the_best_quarter() -> None:
    timing = Timing((1.0, 1.1, 1.2, 5.0, 6.0, 7.0, 8.0, 9.0))
    assert (timing.seconds, timing.median) == (1.2, 6.0)
    assert timing.spread == pytest.approx(0.2)
    assert (Timing((2.0, 3.0)).seconds, Timing((2.0, 3.0)).spread) == (2.0, 0.5)
    assert Timing((2.0,)).spread == float("inf")


@pytest.mark.parametrize(
    ("timing", "said"),
    [
        (Timing((1.0, 1.0, 1.0)), None),
        (Timing((1.0, 1.19, 9.0)), None),
        (Timing((1.0, 1.21, 1.3)), "its best times differ by 21 %"),
        (Timing((1.0,)), "it was timed only once"),
        (Timing((1.0, 1.0, 1.0), Load(0.53)), "the machine was busy: other programs took 53 % of the cores"),
    ],
)
def test_what_must_not_be_kept_says_why(timing: Timing, said: str | None) -> None:
    assert timing.trouble == said


def test_a_quiet_machine_needs_a_few_samples(clock: Clock) -> None:
    found = time_in_turn({"a": clock.sampler(lambda: 1.0), "b": clock.sampler(lambda: 2.0)}, 100, now=clock)
    assert {name: timing.samples for name, timing in found.items()} == {"a": (1.0,) * LEAST, "b": (2.0,) * LEAST}


@pytest.mark.parametrize("seed", range(5))
def test_interruptions_are_waited_out(clock: Clock, seed: int) -> None:
    """Two of five calls are interrupted for up to forty times as long."""
    luck = random.Random(seed)
    cost = lambda: 0.8 * (1 + 0.01 * luck.random()) * (1 + 39 * luck.random() * (luck.random() < 0.4))  # noqa: E731
    found = time_in_turn({"a": clock.sampler(cost)}, 1000.0, now=clock)["a"]
    assert found.seconds == pytest.approx(0.8, rel=0.1)
    assert found.is_steady


def test_what_never_repeats_ends_with_its_time_and_is_refused(clock: Clock) -> None:
    growing = iter(1.5**n for n in range(100))
    found = time_in_turn({"a": clock.sampler(lambda: next(growing))}, 100.0, now=clock)["a"]
    assert clock.seconds < 400
    assert not found.is_reliable


def test_where_two_take_all_of_the_time_the_rest_is_left_out_and_these_are_timed_twice(clock: Clock) -> None:
    slow = {name: clock.sampler(lambda: 10.0) for name in "abcd"}
    found = time_in_turn(slow, 1.0, now=clock)
    assert {name: len(timing.samples) for name, timing in found.items()} == {"a": 2, "b": 2}


def test_a_number_of_rounds_is_kept_to_and_a_first_one_may_be_left_out(clock: Clock) -> None:
    order: list[str] = []
    samplers: dict[str, Any] = {name: lambda name=name: order.append(name) or 1.0 for name in "ab"}
    found = time_in_turn(samplers, rounds=2, warm_up=True, now=clock)
    assert order == list("ababab")
    assert found["a"].samples == (1.0, 1.0)


def test_how_busy_the_machine_was_comes_with_the_times(clock: Clock) -> None:
    found = time_in_turn({"a": clock.sampler(lambda: 1.0)}, 9.0, now=clock, meter=Meter)  # type: ignore[arg-type]
    assert found["a"].load == Load(0.5)
