"""Ratios of speeds over questions, with the interval that resampling the questions gives.

Arrays [n, 2] hold a row for each question: the tokens that its steps yielded, and the seconds they took.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SAMPLES = 2000
CONFIDENCE = 0.95
FEWEST = 8  # questions: of fewer, a bootstrap's interval is too narrow
WIDEST = 0.3  # half the interval ÷ the value: what is less certain is printed only where it is asked for

Yields = npt.NDArray[np.float64]
Statistic = Callable[[Yields, Yields], Yields]


@dataclass(frozen=True)
class Estimate:
    """A ratio over so many questions and its 95 % interval; no interval from fewer than two questions."""

    value: float
    interval: tuple[float, float] | None
    questions: int

    @property
    def is_shown(self) -> bool:
        """Whether the run shows that the arm is faster, or slower: the interval of enough questions leaves 1 out."""
        return self.has_enough and not self.spans_one

    @property
    def has_enough(self) -> bool:
        """Whether its interval is of enough questions to be believed."""
        return self.interval is not None and self.questions >= FEWEST

    @property
    def spans_one(self) -> bool:
        """Whether 1 lies within the interval: no difference is seen."""
        return self.interval is None or self.interval[0] <= 1 <= self.interval[1]

    @property
    def half_width(self) -> float | None:
        """Half the interval ÷ the value."""
        return None if self.interval is None else (self.interval[1] - self.interval[0]) / 2 / self.value

    @property
    def is_uncertain(self) -> bool:
        """Whether the interval is too wide for the number to be printed unasked."""
        return self.half_width is not None and self.half_width > WIDEST


def mean_of_ratios(arm: Yields, vanilla: Yields) -> Yields:
    """Spec-Bench's: the mean over questions of the ratio of tokens per second; [..., n, 2] twice to [...]."""
    speed, speed_of_vanilla = arm[..., 0] / arm[..., 1], vanilla[..., 0] / vanilla[..., 1]
    return np.asarray((speed / speed_of_vanilla).mean(axis=-1))


def ratio_of_totals(arm: Yields, vanilla: Yields) -> Yields:
    """The ratio of total tokens ÷ total seconds; [..., n, 2] twice to [...]."""
    total, total_of_vanilla = arm.sum(axis=-2), vanilla.sum(axis=-2)
    return np.asarray((total[..., 0] / total[..., 1]) / (total_of_vanilla[..., 0] / total_of_vanilla[..., 1]))


def estimate(statistic: Statistic, arm: Yields, vanilla: Yields) -> Estimate:
    """A statistic of all n questions, and its interval when n are drawn with replacement, pairs kept together."""
    value, count = float(statistic(arm, vanilla)), len(arm)
    if count < 2:
        return Estimate(value, None, count)
    drawn = np.random.default_rng(0).integers(0, count, size=(SAMPLES, count))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(statistic(arm[drawn], vanilla[drawn]), (tail, 1 - tail))
    return Estimate(value, (float(low), float(high)), count)
