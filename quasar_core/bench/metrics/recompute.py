"""Compute the figures of a result file again, straight from its JSON and by other means, and say which differ.

`recompute_figures.py` has the second way. Intervals are drawn anew, and have to come out near.
"""

import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from quasar_core.bench.metrics.arm_metrics import ArmMetrics, mean_over_datasets, measure
from quasar_core.bench.metrics.document import as_record
from quasar_core.bench.metrics.recompute_figures import (
    Numbers,
    Rows,
    Yields,
    answer_yields,
    figures,
    mean_speedup,
    pairs,
    ratio,
    splits,
    total_speedup,
    yields,
)
from quasar_core.bench.results import Results
from quasar_core.errors import UsageError
from quasar_core.files import read_json

TOLERANCE = 1e-9  # of sums in another order
RESAMPLED = 1000  # resamplings of an interval, which are others than the table's
# How near to another resampling's an end of an interval lies: of the value, or of a wide interval.
CLOSE, SHARE = 0.03, 0.15


def differences(path: Path, results: Results) -> tuple[int, list[str]]:
    """How many figures were computed again, and a line for each that is not what the rows give."""
    rows = [_as_of_today(row, results) for row in read_json(path, UsageError)["rows"]]
    pairs = [*_derived(rows), *_table(rows, results)]
    wrong = [f"{name}: {shown}, but {again} from the rows" for name, shown, again in pairs if not _same(shown, again)]
    return len(pairs), wrong + _intervals(rows, results)


def _as_of_today(row: dict[str, Any], results: Results) -> dict[str, Any]:
    """Rows of earlier versions lack what all of today's have."""
    former = {"quasar": "quantized"}
    return {"temperature": results.run.config.temperatures[0], **row, "arm": former.get(row["arm"], row["arm"])}


def _same(shown: Any, again: Any) -> bool:
    if shown is None or again is None or isinstance(shown, list):
        return bool(shown == again)
    return math.isclose(shown, again, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _derived(rows: Rows) -> Iterable[tuple[str, Any, Any]]:
    """What each row says of itself, beside its own logs."""
    for number, row in enumerate(rows):
        stats = row["stats"]
        if stats is None:
            continue
        steps, confirms = stats["step_log"], stats["confirm_log"]
        again: Numbers = {
            "steps": len(steps),
            "drafted": sum(step["drafted"] for step in steps),
            "accepted": sum(step["accepted"] for step in steps),
            "confirms": len(confirms),
            "confirm_window": sum(confirm["window"] for confirm in confirms),
            "confirm_accepted": sum(confirm["accepted"] for confirm in confirms),
            "new_tokens": len(row["token_ids"]),
            "acceptance_length": ratio(stats["new_tokens"] - stats["prefill_tokens"], len(steps)),
        }
        for name, value in again.items():
            if name in stats:
                yield f"rows[{number}].{name}", stats[name], value


def _table(rows: Rows, results: Results) -> Iterable[tuple[str, Any, Any]]:
    """The figures of the tables, by dataset and by category, and their means over datasets."""
    passes, bandwidth = results.run.to_dict()["passes"], results.run.bandwidth
    for by_category in (False, True):
        for metric in measure(results, by_category):
            of_place = _of_place(rows, metric)
            shown, splits_shown = as_record(metric), _splits_of(metric)
            for name, value in figures(of_place, metric.arm, passes, bandwidth).items():
                yield f"{_name(metric)}: {name}", shown[name], value
            for split, parts in splits(of_place, metric.arm).items():
                yield f"{_name(metric)}: parts of {split}", splits_shown[split], parts
    yield from _means(rows, results)


def _means(rows: Rows, results: Results) -> Iterable[tuple[str, Any, Any]]:
    """The paper's last column pair, by datasets that each count the same."""
    run = results.run
    for mean in mean_over_datasets(measure(results)):
        of_arm = [row for row in rows if row["temperature"] == mean.temperature]
        names = dict.fromkeys(row["dataset"] for row in of_arm if row["arm"] == mean.arm)
        found = [
            figures([row for row in of_arm if row["dataset"] == name], mean.arm, run.to_dict()["passes"], run.bandwidth)
            for name in names
        ]
        for shown, name in ((mean.speedup, "speedup_total"), (mean.acceptance_length, "acceptance_length")):
            values = [value for one in found if (value := one[name]) is not None]
            again = math.fsum(values) / len(values) if len(values) == len(found) else None
            yield f"mean of datasets, T = {mean.temperature:g}, {mean.arm}: {name}", shown, again


def _of_place(rows: Rows, metric: ArmMetrics) -> Rows:
    place = metric.dataset, metric.temperature
    of_place = [row for row in rows if (row["dataset"], row["temperature"]) == place]
    return [row for row in of_place if metric.category in (None, row["category"])]


def _name(metric: ArmMetrics) -> str:
    return f"{metric.dataset}, T = {metric.temperature:g}, {metric.category or 'all'}, {metric.arm}"


def _splits_of(metric: ArmMetrics) -> dict[str, Any]:
    """The tables of drafts and confirms as they are shown, in the form of `splits`."""
    found = metric.speculation
    counts = [(str(length), count, sum(found.accepted)) for length, count in enumerate(found.accepted)]
    named = {name: getattr(found, name) for name in ("by_place", "by_drafter", "by_position", "refused_by_margin")}
    shares = {name: [(one.name, one.count, one.total) for one in parts] for name, parts in named.items()}
    return {"accepted": counts, **shares, "by_drafter": sorted(shares["by_drafter"])}


INTERVALS = {
    "speedup_total": (yields, total_speedup),
    "speedup_mean": (yields, mean_speedup),
    "speedup_answers": (answer_yields, total_speedup),
}


def _intervals(rows: Rows, results: Results) -> list[str]:
    """Intervals that another resampling does not give, within what chance allows."""
    wrong = []
    for metric in measure(results):
        of_place = _of_place(rows, metric)
        for quantity, (of, statistic) in INTERVALS.items():
            found = getattr(metric, quantity)
            if found is None or found.interval is None or not found.has_enough:
                continue
            again = _resampled(of(pairs(of_place, metric.arm)), statistic)
            near = max(CLOSE * found.value, SHARE * (found.interval[1] - found.interval[0]))
            for name, shown, other in zip(("low", "high"), found.interval, again, strict=True):
                if abs(shown - other) > near:
                    wrong.append(f"{_name(metric)}: {quantity}, interval, {name}: {shown}, but {other} from the rows")
    return wrong


def _resampled(timed: Yields, statistic: Callable[[Yields], float | None]) -> tuple[float, float]:
    chance = random.Random(1)
    speedups = (statistic(chance.choices(timed, k=len(timed))) for _ in range(RESAMPLED))
    drawn = sorted(value for value in speedups if value is not None)
    return drawn[round(0.025 * len(drawn))], drawn[round(0.975 * len(drawn)) - 1]
