"""Speedup over vanilla, in two definitions, each with a bootstrap interval over questions.

Pure. Arrays [n, 2] hold a row for each question: the tokens that its steps yielded, and the seconds they took.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SAMPLES = 2000
CONFIDENCE = 0.95
FEWEST = 8  # questions: of fewer, a bootstrap's interval is too narrow

Floats = npt.NDArray[np.float64]
Statistic = Callable[[Floats, Floats], Floats]


@dataclass(frozen=True)
class Estimate:
    """A speedup over so many questions and its 95 % interval; no interval from fewer than two questions."""

    value: float
    interval: tuple[float, float] | None
    questions: int

    @property
    def is_shown(self) -> bool:
        """Whether the run shows that the arm is faster, or slower: the interval of enough questions leaves 1 out."""
        if self.interval is None or self.questions < FEWEST:
            return False
        low, high = self.interval
        return low > 1 or high < 1


def mean_of_ratios(arm: Floats, vanilla: Floats) -> Floats:
    """Spec-Bench's: the mean over questions of the ratio of tokens per second; [..., n, 2] twice to [...]."""
    speed, speed_of_vanilla = arm[..., 0] / arm[..., 1], vanilla[..., 0] / vanilla[..., 1]
    return np.asarray((speed / speed_of_vanilla).mean(axis=-1))


def ratio_of_totals(arm: Floats, vanilla: Floats) -> Floats:
    """The ratio of total tokens ÷ total seconds; [..., n, 2] twice to [...]."""
    total, total_of_vanilla = arm.sum(axis=-2), vanilla.sum(axis=-2)
    return np.asarray((total[..., 0] / total[..., 1]) / (total_of_vanilla[..., 0] / total_of_vanilla[..., 1]))


def estimate(statistic: Statistic, arm: Floats, vanilla: Floats) -> Estimate:
    """A statistic of all n questions, and its interval when n are drawn with replacement, pairs kept together."""
    value, count = float(statistic(arm, vanilla)), len(arm)
    if count < 2:
        return Estimate(value, None, count)
    drawn = np.random.default_rng(0).integers(0, count, size=(SAMPLES, count))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(statistic(arm[drawn], vanilla[drawn]), (tail, 1 - tail))
    return Estimate(value, (float(low), float(high)), count)
