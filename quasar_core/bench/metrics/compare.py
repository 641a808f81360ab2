"""Set the numbers of result files beside one another, arm by arm, with marks where the difference is shown."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quasar_core.bench.arms import BASELINE, TWIN
from quasar_core.bench.metrics.arm_metrics import ArmMetrics, answers_of, measure, paired_yields
from quasar_core.bench.metrics.estimates import Estimate, estimate, ratio_of_totals
from quasar_core.bench.results import Results, differing_settings
from quasar_core.errors import UsageError

SPEED, SPEEDUP = "tokens/s", "speedup"


@dataclass(frozen=True)
class Change:
    """One number of one arm in two runs; None where a run has no such number.

    `resampled` is the ratio of speeds with the interval that resampling the questions gives, of speeds only.
    """

    dataset: str
    temperature: float
    arm: str
    quantity: str
    before: float | None
    after: float | None
    resampled: Estimate | None = None

    @property
    def ratio(self) -> float | None:
        """After ÷ before."""
        return self.after / self.before if self.before and self.after is not None else None

    @property
    def is_shown(self) -> bool | None:
        """Whether the runs show a difference; None where no interval is known."""
        return self.resampled.is_shown if self.resampled is not None else None

    def is_regression(self, share: float) -> bool:
        """Whether this is a speed, or a speedup, that fell by more than a share of it, and not by chance alone.

        A speed whose interval holds 1 fell by chance. A speedup has no interval of two runs, so its value counts.
        """
        if self.quantity not in (SPEED, SPEEDUP) or self.ratio is None or self.ratio >= 1 - share:
            return False
        return self.resampled is None or not self.resampled.spans_one


@dataclass(frozen=True)
class Comparison:
    """All changes, and the settings that the two runs do not share: name, before, after."""

    settings: list[tuple[str, Any, Any]]
    changes: list[Change]

    def regressions(self, share: float) -> list[Change]:
        """What became slower by more than a share."""
        return [change for change in self.changes if change.is_regression(share)]


QUANTITIES: dict[str, Callable[[ArmMetrics], float | None]] = {
    SPEED: lambda metric: metric.tokens_per_s,
    SPEEDUP: lambda metric: metric.speedup_total.value if metric.speedup_total else None,
    "acceptance length": lambda metric: metric.acceptance_length,
}


def compare(before: Results, after: Results) -> Comparison:
    """Compare two runs over the same questions, arm by arm; arms of one run only are left out.

    Raises UsageError when the questions differ, or no arm is in both.
    """
    _check_questions(before, after)
    metrics = {_place(metric): metric for metric in measure(before)}
    pairs = [(metrics[_place(metric)], metric) for metric in measure(after) if _place(metric) in metrics]
    pairs = [(old, new) for old, new in pairs if old.arm != TWIN]
    if not pairs:
        raise UsageError("The two result files have no arm in common.")
    changes = [
        Change(*_place(old), quantity, value(old), value(new), _resampled(before, after, old, quantity))
        for old, new in pairs
        for quantity, value in QUANTITIES.items()
        if old.arm != BASELINE or quantity == SPEED  # vanilla's ratios are 1 by definition
    ]
    return Comparison(differing_settings(before.run, after.run), changes)


def _place(metric: ArmMetrics) -> tuple[str, float, str]:
    return metric.dataset, metric.temperature, metric.arm


def _resampled(before: Results, after: Results, metric: ArmMetrics, quantity: str) -> Estimate | None:
    """The ratio of an arm's speeds in two runs, questions drawn with replacement."""
    if quantity != SPEED:
        return None
    new, old = paired_yields(answers_of(after, *_place(metric)), answers_of(before, *_place(metric)))
    return estimate(ratio_of_totals, new, old) if len(new) else None


def compare_all(runs: Sequence[Results]) -> list[Comparison]:
    """Each run after the first beside the first; raises as `compare`."""
    return [compare(runs[0], other) for other in runs[1:]]


def _check_questions(before: Results, after: Results) -> None:
    if _digests(before) != _digests(after):
        raise UsageError(
            f"The two result files are not about the same questions: {_describe(before)} and {_describe(after)}."
        )


def _digests(results: Results) -> dict[str, str]:
    return {name: content["sha256"] for name, content in results.run.datasets.items()}


def _describe(results: Results) -> str:
    return ", ".join(
        f"{name} ({content['questions']} questions, digest {content['sha256'][:8]})"
        for name, content in results.run.datasets.items()
    )
