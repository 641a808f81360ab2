"""Time something until its times repeat, and say what disturbed them.

Other work on a machine only ever adds to a time. So what something costs is the first quartile of its times, and they
repeat where the best quarter of them lies near together.
"""

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from quasar_core.system import QUIET, Load, LoadMeter

Sampler = Callable[[], float]  # does something once, and returns the seconds that it took
Name = TypeVar("Name", bound=Hashable)

LEAST = 3  # samples, where there is time for them
STEADY = 0.05  # spread at which repeating ends
UNRELIABLE = 0.2  # spread above which a time is no more than a guess


@dataclass(frozen=True)
class Timing:
    """Seconds of something, ascending, and how busy other programs kept the machine meanwhile."""

    samples: tuple[float, ...]
    load: Load = QUIET

    @property
    def seconds(self) -> float:
        """What it costs: the first quartile; of three or less the best."""
        return self.samples[len(self.samples) // 4]

    @property
    def median(self) -> float:
        """What it took as often as not."""
        return self.samples[len(self.samples) // 2]

    @property
    def spread(self) -> float:
        """How much the times of the best quarter differ, at least the two best; infinite for a single one."""
        if len(self.samples) < 2:
            return float("inf")
        return self.samples[max(1, len(self.samples) // 4)] / self.samples[0] - 1

    @property
    def is_steady(self) -> bool:
        """Whether more samples would tell nothing new."""
        return len(self.samples) >= LEAST and self.spread <= STEADY

    @property
    def is_reliable(self) -> bool:
        """Whether it may be chosen by, in this run."""
        return self.spread <= UNRELIABLE

    @property
    def trouble(self) -> str | None:
        """Why it must not be kept for later runs, in a few words; None for a time that may be."""
        if self.load.is_busy:
            return f"the machine was busy: {self.load.describe()}"
        if len(self.samples) < 2:
            return "it was timed only once"
        return None if self.is_reliable else f"its best times differ by {100 * self.spread:.0f} %"


def timed(work: Callable[[], object], now: Callable[[], float] = time.perf_counter) -> Sampler:
    """A sampler of work that has ended when it returns."""

    def sample() -> float:
        start = now()
        work()
        return now() - start

    return sample


def time_in_turn(
    samplers: Mapping[Name, Sampler],
    seconds: float = 0.0,
    *,
    rounds: int | None = None,
    warm_up: bool = False,
    now: Callable[[], float] = time.perf_counter,
    meter: Callable[[], LoadMeter] = LoadMeter,
) -> dict[Name, Timing]:
    """Sample each in every round, until all are steady or the seconds are over; with `rounds`, so many.

    With `warm_up`, a first round is not counted. Where two of them take all of the time, the rest is left out; two
    samples of each are taken in any case.
    """
    names, samples = list(samplers), {name: list[float]() for name in samplers}
    load, begin, done = meter(), now(), 0
    for name in names if warm_up else ():
        samplers[name]()
    while not _is_enough([samples[name] for name in names], done, rounds, late=now() - begin > seconds):
        for number, name in enumerate(names, 1):
            samples[name].append(samplers[name]())
            if rounds is None and done == 0 and number >= 2 and now() - begin > seconds:
                names = names[:number]
                break
        done += 1
    found = load.read()
    return {name: Timing(tuple(sorted(samples[name])), found) for name in names}


def time_one(
    sampler: Sampler,
    seconds: float = 0.0,
    *,
    rounds: int | None = None,
    warm_up: bool = False,
    now: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time one thing, as `time_in_turn` does."""
    return time_in_turn({"": sampler}, seconds, rounds=rounds, warm_up=warm_up, now=now)[""]


def _is_enough(samples: list[list[float]], done: int, rounds: int | None, late: bool) -> bool:
    if rounds is not None:
        return done >= rounds
    if late and done >= 2:
        return True
    return done >= LEAST and all(Timing(tuple(sorted(taken))).is_steady for taken in samples)
