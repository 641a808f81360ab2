"""The tables of a bench: like the paper's, in detail, by category; as grids that `render.grids` draws, and as CSV."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quasar_cli.render import as_bytes, as_ratio
from quasar_cli.render.bench_words import DOUBT, MARK, WIDE
from quasar_cli.render.grids import Column, Grid
from quasar_core.bench.arms import BASELINE, TWIN
from quasar_core.bench.metrics.arm_metrics import ArmMetrics, Shares, Spread, mean_over_datasets, measure
from quasar_core.bench.metrics.compare import Comparison
from quasar_core.bench.metrics.document import as_record
from quasar_core.bench.metrics.estimates import Estimate
from quasar_core.bench.metrics.speculation import Share
from quasar_core.bench.report.cells import label
from quasar_core.bench.results import Results
from quasar_core.bench.simulation.simulate import REPLAYS, Prediction

DATASETS_PER_TABLE = 5  # what fits into 100 columns

# The paper's own (Ascend 910B2, Qwen3-8B, T = 0, mean of five datasets): speedup, acceptance length.
PAPERS_OWN = (("the paper's n-gram", "1.18×", "1.33"), ("the paper's Quasar, W8A8", "1.28×", "1.40"))


@dataclass(frozen=True)
class Shown:
    """What is printed: speedups that are uncertain, tables of drafts and confirms, the paper's own figures."""

    uncertain: bool = False
    details: bool = False
    paper: bool = False


def result_grids(results: Results, shown: Shown = Shown()) -> list[Grid]:
    """All tables of a result file, in the order in which they are shown."""
    metrics = [metric for metric in measure(results) if metric.arm != TWIN]
    grids = [*main_grids(metrics, shown), speed_grid(metrics, shown), acceptance_grid(metrics), cost_grid(metrics)]
    if any(metric.agreement or metric.scored for metric in metrics):
        grids.append(quality_grid(metrics))
    if shown.details:
        grids += detail_grids(metrics)
    by_category = [metric for metric in measure(results, by_category=True) if metric.arm != TWIN]
    for place in dict.fromkeys(map(_place, metrics)):
        of_place = [metric for metric in by_category if _place(metric) == place]
        if len({one.category for one in of_place}) > 1:
            grids.append(category_grid(label(of_place[0], metrics), of_place, shown))
    return grids


def _place(metric: ArmMetrics) -> tuple[str, float]:
    return metric.dataset, metric.temperature


def main_grids(metrics: Sequence[ArmMetrics], shown: Shown = Shown()) -> list[Grid]:
    """The paper's table for each temperature: a row per arm, a column pair per dataset, the mean last."""
    grids = []
    temperatures = list(dict.fromkeys(metric.temperature for metric in metrics))
    for temperature in temperatures:
        found = [metric for metric in metrics if metric.temperature == temperature]
        datasets = list(dict.fromkeys(metric.dataset for metric in found))
        parts = [datasets[i : i + DATASETS_PER_TABLE] for i in range(0, len(datasets), DATASETS_PER_TABLE)]
        suffix = f", T = {temperature:g}" if len(temperatures) > 1 else ""
        grids += [_main_grid(found, part, len(datasets) > 1 and part is parts[-1], shown, suffix) for part in parts]
    return grids


def _main_grid(
    metrics: Sequence[ArmMetrics], datasets: Sequence[str], with_mean: bool, shown: Shown, suffix: str
) -> Grid:
    with_mean = with_mean or shown.paper
    columns = [Column("arm", number=False)]
    for group in [*datasets, *(["mean"] if with_mean else [])]:
        columns += [Column("speedup", group), Column("len", group)]
    by_place = {(metric.arm, metric.dataset): metric for metric in metrics}
    rows = []
    for mean in mean_over_datasets(metrics):
        row = [mean.arm]
        for metric in (by_place.get((mean.arm, dataset)) for dataset in datasets):
            row += [_speedup(metric, shown), as_ratio(metric.acceptance_length)] if metric else ["–", "–"]
        if with_mean:
            row += [as_ratio(mean.speedup, unit="×"), as_ratio(mean.acceptance_length)]
        rows.append(row)
    if shown.paper:
        rows += [[name, *["–"] * 2 * len(datasets), speedup, length] for name, speedup, length in PAPERS_OWN]
    return Grid(f"Speedup and acceptance length{suffix}", columns, rows)


def _grid(title: str, metrics: Sequence[ArmMetrics], cells: dict[str, Callable[[ArmMetrics], str]]) -> Grid:
    """A row for each dataset and arm."""
    columns = [Column("dataset", number=False), Column("arm", number=False), *map(Column, cells)]
    rows = [[label(metric, metrics), metric.arm, *(cell(metric) for cell in cells.values())] for metric in metrics]
    return Grid(title, columns, rows)


def speed_grid(metrics: Sequence[ArmMetrics], shown: Shown = Shown()) -> Grid:
    """Speed in both definitions, and on how many questions the text is vanilla's."""
    columns = [Column("dataset", number=False), Column("arm", number=False), Column("tokens/s"), Column("speedup")]
    columns += [Column(name) for name in ("95 % interval", "by question", "95 % interval", "with prompt", "= vanilla")]
    rows = [
        [
            label(metric, metrics),
            metric.arm,
            as_ratio(metric.tokens_per_s, 1),
            _speedup(metric, shown),
            _interval(metric, metric.speedup_total),
            _times(metric, metric.speedup_mean, shown),
            _interval(metric, metric.speedup_mean),
            _times(metric, metric.speedup_answers, shown),
            _identical(metric),
        ]
        for metric in metrics
    ]
    return Grid(
        "Speed (by question: mean over questions of tokens/s ÷ vanilla's; with prompt: of whole answers)", columns, rows
    )


def acceptance_grid(metrics: Sequence[ArmMetrics]) -> Grid:
    """Counts and their ratios: acceptance length in three definitions, acceptance rate, confirm rate."""
    title = "Acceptance (len: in total; by question: the mean of their own; vLLM's: drafted steps only)"
    return _grid(
        title,
        metrics,
        {
            "tokens": lambda metric: str(metric.new_tokens),
            "steps": lambda metric: str(metric.steps),
            "len": lambda metric: as_ratio(metric.acceptance_length),
            "by question": lambda metric: as_ratio(metric.acceptance_length_mean),
            "vLLM's": lambda metric: as_ratio(metric.acceptance_length_vllm),
            "accepted": lambda metric: as_ratio(metric.acceptance_rate),
            "confirmed": lambda metric: as_ratio(metric.confirm_rate),
            "per confirm": lambda metric: as_ratio(metric.speculation.tokens_per_confirm, 1),
            "failed": lambda metric: str(metric.failed),
        },
    )


def cost_grid(metrics: Sequence[ArmMetrics]) -> Grid:
    """Milliseconds to the first token and for each, where the time goes, bytes, memory, energy."""
    return _grid(
        "Cost (ms: median and 95th percentile of the answers; then shares of the time of decoding)",
        metrics,
        {
            "first token": lambda metric: _milliseconds(metric.ttft_s, 0),
            "per token": lambda metric: _milliseconds(metric.token_s, 1),
            "draft, verify, confirm, other": lambda metric: _percentages(metric.shares),
            "read/token": lambda metric: as_bytes(metric.bytes_per_token) if metric.bytes_per_token else "–",
            "floor": lambda metric: _percent(metric.floor_share),
            "memory": lambda metric: as_bytes(metric.peak_memory_bytes) if metric.peak_memory_bytes else "–",
            "J/token": lambda metric: as_ratio(metric.joules_per_token),
        },
    )


def quality_grid(metrics: Sequence[ArmMetrics]) -> Grid:
    """How far texts are the target's own, and how many answers are right."""
    return _grid(
        "Quality (beside the text of vanilla, the target's own)",
        metrics,
        {
            "tokens equal": lambda metric: as_ratio(metric.agreement.value if metric.agreement else None, 4),
            "first difference": lambda metric: as_ratio(metric.agreement.first if metric.agreement else None, 0),
            "right": lambda metric: f"{metric.correct}/{metric.scored}" if metric.scored else "–",
            "score": lambda metric: as_ratio(metric.correct / metric.scored, 3) if metric.scored else "–",
        },
    )


def detail_grids(metrics: Sequence[ArmMetrics]) -> list[Grid]:
    """What became of drafts and windows: a table for each way of splitting them, a column for each part."""
    tables: dict[str, Callable[[ArmMetrics], list[Share]]] = {
        "Steps by accepted tokens": lambda metric: _histogram(metric.speculation.accepted),
        "Accepted of drafted tokens, by place in the draft": lambda metric: metric.speculation.by_place,
        "Accepted of drafted tokens, by drafter": lambda metric: metric.speculation.by_drafter,
        "Tokens per step, by position in the answer": lambda metric: metric.speculation.by_position,
        "Refused of judged tokens, by the verifier's margin in nats": lambda m: m.speculation.refused_by_margin,
    }
    grids = []
    for title, of in tables.items():
        names = list(dict.fromkeys(share.name for metric in metrics for share in of(metric)))
        if names:
            cells = {name: _share_cell(name, of) for name in names}
            grids.append(_grid(title, [metric for metric in metrics if of(metric)], cells))
    return grids


def _share_cell(name: str, of: Callable[[ArmMetrics], list[Share]]) -> Callable[[ArmMetrics], str]:
    return lambda metric: as_ratio(next((share.value for share in of(metric) if share.name == name), None))


def _histogram(counts: Sequence[int]) -> list[Share]:
    return [Share(str(length), count, sum(counts)) for length, count in enumerate(counts)]


def category_grid(name: str, metrics: Sequence[ArmMetrics], shown: Shown = Shown()) -> Grid:
    """A row per category, a column pair per arm but vanilla, which is the measure."""
    arms = list(dict.fromkeys(metric.arm for metric in metrics if metric.arm != BASELINE))
    columns = [Column("category", number=False), Column("questions")]
    for arm in arms:
        columns += [Column("speedup", arm), Column("len", arm)]
    rows = []
    for category in dict.fromkeys(metric.category for metric in metrics):
        of_arm = {metric.arm: metric for metric in metrics if metric.category == category}
        row = [str(category), str(max(metric.questions for metric in of_arm.values()))]
        for metric in map(of_arm.get, arms):
            row += [_speedup(metric, shown), as_ratio(metric.acceptance_length)] if metric else ["–", "–"]
        rows.append(row)
    return Grid(f"{name} by category", columns, rows)


def comparison_grids(comparison: Comparison, name: str = "") -> list[Grid]:
    """What changed between two runs, and the settings in which they differ."""
    columns = [Column("dataset", number=False), Column("arm", number=False), Column("quantity", number=False)]
    columns += [Column("before"), Column("after"), Column("ratio"), Column("95 % interval")]
    several = len({change.temperature for change in comparison.changes}) > 1
    rows = [
        [
            f"{change.dataset}, T = {change.temperature:g}" if several else change.dataset,
            change.arm,
            change.quantity,
            as_ratio(change.before),
            as_ratio(change.after),
            as_ratio(change.ratio, 3) + (MARK if change.is_shown else ""),
            "{:.3f}–{:.3f}".format(*change.resampled.interval)
            if change.resampled and change.resampled.interval
            else "–",
        ]
        for change in comparison.changes
    ]
    grids = [Grid(f"Changes{f' to {name}' if name else ''}", columns, rows)]
    if comparison.settings:
        heads = [Column(name, number=False) for name in ("setting", "before", "after")]
        settings = [[_setting(value) for value in setting] for setting in comparison.settings]
        grids.append(Grid("Settings that differ", heads, settings))
    return grids


def simulation_grid(predictions: Sequence[Prediction]) -> Grid:
    """The speed of each policy by the replay, and as it was measured where an arm decided so."""
    columns = [Column("policy", number=False), *map(Column, ("predicted", "±", "measured", "ratio"))]
    rows = [
        [
            one.policy,
            as_ratio(one.predicted, 1),
            as_ratio(one.spread, 1),
            as_ratio(one.measured, 1),
            as_ratio(one.ratio),
        ]
        for one in predictions
    ]
    return Grid(f"exact under other policies: tokens per second, mean and spread of {REPLAYS} replays", columns, rows)


def as_csv(results: Results) -> str:
    """One line for each dataset and arm, then one for each category and arm; numbers at full precision."""
    records = [as_record(metric) for by_category in (False, True) for metric in measure(results, by_category)]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(records[0]) if records else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "–" if value is None else str(value)


def _speedup(metric: ArmMetrics, shown: Shown) -> str:
    """The headline: of total tokens ÷ total seconds."""
    return _times(metric, metric.speedup_total, shown)


def _times(metric: ArmMetrics, estimate: Estimate | None, shown: Shown) -> str:
    if estimate is None:
        return "–"
    if metric.arm == BASELINE:
        return f"{estimate.value:.2f}×"
    if estimate.is_uncertain and not shown.uncertain:
        return WIDE
    return f"{estimate.value:.2f}×{'' if estimate.is_shown else DOUBT}"


def _interval(metric: ArmMetrics, estimate: Estimate | None) -> str:
    if estimate is None or estimate.interval is None or metric.arm == BASELINE:
        return "–"
    return "{:.2f}–{:.2f}".format(*estimate.interval)


def _identical(metric: ArmMetrics) -> str:
    if metric.identical is None or metric.arm == BASELINE:
        return "–"
    return f"{metric.identical}/{metric.questions}"


def _milliseconds(spread: Spread | None, digits: int) -> str:
    return "–" if spread is None else f"{1000 * spread.median:.{digits}f}, {1000 * spread.p95:.{digits}f}"


def _percentages(shares: Shares | None) -> str:
    if shares is None:
        return "–"
    parts = shares.draft, shares.verify, shares.confirm, shares.other
    return ", ".join(f"{100 * part:.0f}" for part in parts) + " %"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"
