"""Compute the figures of a result file again, straight from its JSON and by other means, and say which differ.

Nothing of `records`, `metrics` or `estimates` is used: loops over the rows, and numbers written down as
docs/measuring.md defines them. Intervals are drawn anew, and have to come out near.
"""

import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from quasar_core.bench.arms import ARMS
from quasar_core.bench.document import as_record
from quasar_core.bench.metrics import measure
from quasar_core.bench.results import Results
from quasar_core.errors import UsageError
from quasar_core.files import read_json

BASELINE = "vanilla"
TOLERANCE = 1e-9  # of sums in another order
RESAMPLED = 1000  # resamplings of an interval, which are others than the table's
CLOSE = 0.03  # of the value: how near to another resampling's an end of an interval lies

Rows = list[dict[str, Any]]
Numbers = dict[str, float | int | None]


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
    if shown is None or again is None:
        return shown is again
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
            "acceptance_length": _ratio(stats["new_tokens"] - stats["prefill_tokens"], len(steps)),
        }
        for name, value in again.items():
            if name in stats:
                yield f"rows[{number}].{name}", stats[name], value


def _table(rows: Rows, results: Results) -> Iterable[tuple[str, Any, Any]]:
    """The figures of the tables, by dataset and by category."""
    for by_category in (False, True):
        for metric in measure(results, by_category):
            shown = as_record(metric)
            again = _figures(rows, metric.dataset, metric.temperature, metric.category, metric.arm)
            place = f"{metric.dataset}, T = {metric.temperature:g}, {metric.category or 'all'}, {metric.arm}"
            for name, value in again.items():
                yield f"{place}: {name}", shown[name], value


def _figures(rows: Rows, dataset: str, temperature: float, category: str | None, arm: str) -> Numbers:
    of_place = [
        row
        for row in rows
        if (row["dataset"], row["temperature"]) == (dataset, temperature) and category in (None, row["category"])
    ]
    ours, theirs = _whole(of_place, arm), _whole(of_place, BASELINE)
    kept = [row for question in ours.values() for row in question]
    both = [(ours[key], theirs[key]) for key in ours if key in theirs]
    yields = [(_tokens(a), _seconds(a), _tokens(b), _seconds(b)) for a, b in both]
    yields = [one for one in yields if all(one)]
    steps = _count(kept, "step_log", None)
    compared = temperature == 0 or not ARMS[arm].is_peer
    return {
        "new_tokens": sum(row["stats"]["new_tokens"] for row in kept),
        "steps": steps,
        "decode_s": _seconds(kept),
        "tokens_per_s": _ratio(_tokens(kept), _seconds(kept)),
        "acceptance_length": _ratio(_tokens(kept), steps),
        "acceptance_rate": _ratio(_count(kept, "step_log", "accepted"), _count(kept, "step_log", "drafted")),
        "confirm_rate": _ratio(_count(kept, "confirm_log", "accepted"), _count(kept, "confirm_log", "window")),
        "speedup_total": _total_speedup(yields),
        "speedup_mean": _ratio(sum(a / b / (c / d) for a, b, c, d in yields), len(yields)),
        "identical": sum(_ids(a) == _ids(b) for a, b in both) if theirs and compared else None,
        "correct": sum(row.get("correct") is True for row in kept),
        "failed": len({row["question_id"] for row in of_place if row["arm"] == arm}) - len(ours),
    }


def _whole(rows: Rows, arm: str) -> dict[Any, Rows]:
    """An arm's rows by question, without those of which one failed."""
    found: dict[Any, Rows] = {}
    for row in rows:
        if row["arm"] == arm:
            found.setdefault(row["question_id"], []).append(row)
    return {key: of_one for key, of_one in found.items() if all(row["stats"] is not None for row in of_one)}


def _ids(rows: Rows) -> list[list[int]]:
    return [row["token_ids"] for row in sorted(rows, key=lambda row: (row["repeat"], row["turn"]))]


def _tokens(rows: Rows) -> int:
    return sum(row["stats"]["new_tokens"] - row["stats"]["prefill_tokens"] for row in rows)


def _seconds(rows: Rows) -> float:
    return math.fsum(row["stats"]["decode_s"] for row in rows)


def _count(rows: Rows, log: str, name: str | None) -> int:
    return sum(one[name] if name else 1 for row in rows for one in row["stats"][log])


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None


def _total_speedup(yields: Sequence[tuple[float, float, float, float]]) -> float | None:
    if not yields:
        return None
    tokens, seconds, plain_tokens, plain_seconds = (math.fsum(one[i] for one in yields) for i in range(4))
    return tokens / seconds / (plain_tokens / plain_seconds)


def _intervals(rows: Rows, results: Results) -> list[str]:
    """Intervals of the headline that another resampling does not give, within what chance allows."""
    wrong = []
    for metric in measure(results):
        found = metric.speedup_total
        if found is None or found.interval is None or not found.has_enough:
            continue
        low, high = _resampled(rows, metric.dataset, metric.temperature, metric.arm)
        for name, shown, again in (("low", found.interval[0], low), ("high", found.interval[1], high)):
            if abs(shown - again) > CLOSE * found.value:
                wrong.append(f"{metric.dataset} {metric.arm} interval, {name}: {shown}, but {again} from the rows")
    return wrong


def _resampled(rows: Rows, dataset: str, temperature: float, arm: str) -> tuple[float, float]:
    of_place = [row for row in rows if (row["dataset"], row["temperature"]) == (dataset, temperature)]
    ours, theirs = _whole(of_place, arm), _whole(of_place, BASELINE)
    both = [(ours[key], theirs[key]) for key in ours if key in theirs]
    yields = [(_tokens(a), _seconds(a), _tokens(b), _seconds(b)) for a, b in both]
    yields = [one for one in yields if all(one)]
    chance = random.Random(1)
    speedups = (_total_speedup(chance.choices(yields, k=len(yields))) for _ in range(RESAMPLED))
    drawn = sorted(value for value in speedups if value is not None)
    return drawn[round(0.025 * len(drawn))], drawn[round(0.975 * len(drawn)) - 1]
