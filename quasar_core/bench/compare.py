"""Two result files side by side: what changed, by dataset and arm. Pure."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quasar_core.bench.arms import BASELINE
from quasar_core.bench.metrics import ArmMetrics, measure
from quasar_core.bench.results import Results, differing_settings
from quasar_core.errors import UsageError


@dataclass(frozen=True)
class Change:
    """One number of one arm in two runs; None where a run has no such number."""

    dataset: str
    arm: str
    quantity: str
    before: float | None
    after: float | None

    @property
    def ratio(self) -> float | None:
        """After ÷ before."""
        return self.after / self.before if self.before and self.after is not None else None


@dataclass(frozen=True)
class Comparison:
    """All changes, and the settings that the two runs do not share: name, before, after."""

    settings: list[tuple[str, Any, Any]]
    changes: list[Change]


SPEED = "tokens/s"
QUANTITIES: dict[str, Callable[[ArmMetrics], float | None]] = {
    SPEED: lambda metric: metric.tokens_per_s,
    "speedup": lambda metric: metric.speedup_total.value if metric.speedup_total else None,
    "acceptance length": lambda metric: metric.acceptance_length,
}


def compare(before: Results, after: Results) -> Comparison:
    """Compare two runs over the same questions, arm by arm; arms of one run only are left out.

    Raises UsageError when the questions differ, or no arm is in both.
    """
    _check_questions(before, after)
    metrics = {(metric.dataset, metric.arm): metric for metric in measure(before)}
    pairs = [(metrics[key], metric) for metric in measure(after) if (key := (metric.dataset, metric.arm)) in metrics]
    if not pairs:
        raise UsageError("The two result files have no arm in common.")
    changes = [
        Change(old.dataset, old.arm, quantity, value(old), value(new))
        for old, new in pairs
        for quantity, value in QUANTITIES.items()
        if old.arm != BASELINE or quantity == SPEED  # vanilla's ratios are 1 by definition
    ]
    return Comparison(differing_settings(before.run, after.run), changes)


def _check_questions(before: Results, after: Results) -> None:
    if before.run.datasets != after.run.datasets:
        raise UsageError(
            f"The two result files are not about the same questions: {_describe(before)} and {_describe(after)}."
        )


def _describe(results: Results) -> str:
    return ", ".join(
        f"{name} ({content['questions']} questions, digest {content['sha256'][:8]})"
        for name, content in results.run.datasets.items()
    )
