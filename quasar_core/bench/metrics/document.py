"""A result file's figures as one JSON document: what `--json` prints, and what the page shows."""

from dataclasses import asdict
from typing import Any

from quasar_core.bench.metrics.arm_metrics import ArmMetrics, mean_over_datasets, measure
from quasar_core.bench.metrics.conditions import conditions
from quasar_core.bench.metrics.estimates import Estimate
from quasar_core.bench.results import Results

ESTIMATES = ("speedup_mean", "speedup_total", "speedup_answers")
_NESTED = {  # fields whose own fields become columns
    "ttft_s": ("median", "p95"),
    "token_s": ("median", "p95"),
    "shares": ("draft", "verify", "confirm", "other"),
}


def as_document(results: Results) -> dict[str, Any]:
    """The run, the metrics by dataset and by category, the means, the conditions, the failures."""
    metrics, found = measure(results), conditions(results)
    return {
        "run": results.run.to_dict(),
        "metrics": [{**as_record(metric), **_tables_of(metric)} for metric in metrics],
        "categories": [as_record(metric) for metric in measure(results, by_category=True)],
        "conditions": {**asdict(found), "was_busy": found.was_busy, "twins_agree": found.twins_agree},
        "means": [asdict(mean) for mean in mean_over_datasets(metrics)],
        "achieved": [{**asdict(one), "share": one.share} for one in results.achieved],
        "divergences": [{**asdict(one), "near_tie": one.near_tie} for one in results.divergences],
        "errors": [
            {"dataset": row.dataset, "question_id": row.question_id, "arm": row.arm, "error": row.error}
            for row in results.errors
        ],
    }


def _tables_of(metric: ArmMetrics) -> dict[str, Any]:
    """What of an arm's metrics is a table of its own."""
    return {
        "speculation": asdict(metric.speculation),
        "drafters": {name: asdict(use) for name, use in metric.drafters.items()},
    }


def as_record(metric: ArmMetrics) -> dict[str, Any]:
    """The metrics of an arm, flat: an interval becomes two numbers; what is a table of its own is left out."""
    record = {name: value for name, value in asdict(metric).items() if name not in ("speculation", "drafters")}
    for name in ESTIMATES:
        record |= _flat_estimate(name, getattr(metric, name))
    for name, parts in _NESTED.items():
        nested = record.pop(name) or {}
        record |= {f"{name}_{part}": nested.get(part) for part in parts}  # the same columns for every arm
    agreed = metric.agreement
    record |= {"agreement": agreed.value if agreed else None, "first_difference": agreed.first if agreed else None}
    record["tokens_per_confirm"] = metric.speculation.tokens_per_confirm
    return record


def _flat_estimate(name: str, estimate: Estimate | None) -> dict[str, Any]:
    low, high = estimate.interval if estimate and estimate.interval else (None, None)
    return {
        name: estimate.value if estimate else None,
        f"{name}_low": low,
        f"{name}_high": high,
        f"{name}_shown": estimate.is_shown if estimate else None,
        f"{name}_uncertain": estimate.is_uncertain if estimate else None,
    }
