"""Cells of the page's tables: an arm's dataset, its speedup and its interval."""

from collections.abc import Sequence

from quasar_core.bench.arms import BASELINE
from quasar_core.bench.metrics.arm_metrics import ArmMetrics
from quasar_core.bench.metrics.estimates import Estimate
from quasar_core.bench.report.html import MISSING


def label(metric: ArmMetrics, metrics: Sequence[ArmMetrics]) -> str:
    """The dataset, with the temperature where there are several."""
    several = len({one.temperature for one in metrics}) > 1
    return f"{metric.dataset}, T = {metric.temperature:g}" if several else metric.dataset


def speedup_cell(metric: ArmMetrics) -> str:
    """The headline's speedup as tables show it."""
    return cell(metric, metric.speedup_total)


def cell(metric: ArmMetrics, found: Estimate | None) -> str:
    """One of an arm's speedups: wide where it is too uncertain to be told, with a ? where it is in doubt."""
    if found is None:
        return MISSING
    if metric.arm == BASELINE:
        return f"{found.value:.2f}×"
    return "wide" if found.is_uncertain else f"{found.value:.2f}×{'' if found.is_shown else '?'}"


def interval(found: Estimate | None) -> str:
    """An interval as its two ends."""
    return "{:.2f}–{:.2f}".format(*found.interval) if found and found.interval else MISSING
