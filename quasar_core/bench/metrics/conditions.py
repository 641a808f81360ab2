"""The conditions of a run: how busy other programs kept the machine, and whether two identical arms agree."""

from dataclasses import dataclass
from statistics import fmean

import numpy as np

from quasar_core.bench.arms import BASELINE, TWIN
from quasar_core.bench.metrics.arm_metrics import answers_of, paired_yields
from quasar_core.bench.metrics.estimates import Estimate, estimate, ratio_of_totals
from quasar_core.bench.results import Results
from quasar_core.system import Load


@dataclass(frozen=True)
class Conditions:
    """How far the machine was the run's own; None where the system did not tell.

    `others` and `most_others` are the mean and the largest share of the cores that other programs took during an
    answer, `busy` the answers during which that was too much to trust their seconds. `mhz` is the range of the cores'
    frequency. `reference_spread` is that of vanilla's tokens per second: the half of its answers in the middle, high ÷
    low − 1. `twins` is the speedup of vanilla asked again, over all questions that it was asked again. `energy` says
    what was counted of it.
    """

    answers: int
    busy: int
    others: float | None
    most_others: float | None
    mhz: tuple[float, float] | None
    reference_spread: float | None
    twins: Estimate | None
    energy: str | None

    @property
    def was_busy(self) -> bool:
        """Whether enough answers were disturbed to doubt the seconds."""
        return 10 * self.busy > self.answers

    @property
    def twins_agree(self) -> bool | None:
        """Whether two identical arms agree within the interval; None where there are too few questions to tell."""
        return self.twins.spans_one if self.twins is not None and self.twins.has_enough else None


def conditions(results: Results) -> Conditions:
    """What the rows say of the machine; answers that an older version wrote say nothing."""
    others = [row.others for row in results.rows if row.others is not None]
    mhz = [row.mhz for row in results.rows if row.mhz is not None]
    speeds = [row.stats.tokens_per_s for row in results.rows if row.arm == BASELINE and row.stats]
    known = [speed for speed in speeds if speed]
    low, high = np.quantile(known, (0.25, 0.75)) if len(known) > 1 else (1.0, 1.0)
    return Conditions(
        answers=len(results.rows),
        busy=sum(Load(share).is_busy for share in others),
        others=fmean(others) if others else None,
        most_others=max(others, default=None),
        mhz=(min(mhz), max(mhz)) if mhz else None,
        reference_spread=float(high / low - 1) if len(known) > 1 else None,
        twins=_twins(results),
        energy=_energy(results),
    )


def _energy(results: Results) -> str | None:
    """What the joules of the rows count; files of earlier versions do not say which counters they were."""
    counted = any(row.joules is not None for row in results.rows)
    return (results.run.energy or "what RAPL and NVML told") if counted else None


def _twins(results: Results) -> Estimate | None:
    """Vanilla asked again ÷ vanilla, the questions of all datasets and temperatures together."""
    if TWIN not in results.run.config.arms:
        return None
    again, first = [], []
    for dataset, temperature in dict.fromkeys((row.dataset, row.temperature) for row in results.rows):
        pairs = paired_yields(
            answers_of(results, dataset, temperature, TWIN), answers_of(results, dataset, temperature, BASELINE)
        )
        again.append(pairs[0])
        first.append(pairs[1])
    timed = np.concatenate(again)
    return estimate(ratio_of_totals, timed, np.concatenate(first)) if len(timed) else None
