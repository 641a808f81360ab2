"""The tables of a bench: like the paper's, in detail, by category; for a terminal, as Markdown, as CSV.

A table is built once, as a Grid of texts, and drawn either way.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from quasar_cli.render import as_ratio
from quasar_cli.render.fitted import FittedTable
from quasar_core.bench.arms import BASELINE
from quasar_core.bench.metrics import FEWEST, ArmMetrics, Comparison, Estimate, conditions, mean_over_datasets, measure
from quasar_core.bench.results import Results

DATASETS_PER_TABLE = 5  # what fits into 100 columns

DOUBT = "?"  # behind a speedup that the run does not show
LEGEND = (
    "speedup: total tokens ÷ total seconds, by vanilla's; the prompt's pass left out\n"
    f"{DOUBT}: not shown, as its 95 % interval spans 1 or there are fewer than {FEWEST} questions\n"
    "len: acceptance length, new tokens ÷ steps; plain decoding is 1.00"
)
PAPER = "quantized: the verifier's text, not the target's; the method of the paper Quasar"


@dataclass(frozen=True)
class Column:
    """A head of up to two lines; numbers stand to the right."""

    name: str
    group: str = ""
    number: bool = True


@dataclass(frozen=True)
class Grid:
    """A table of texts."""

    title: str
    columns: list[Column]
    rows: list[list[str]]


def result_grids(results: Results) -> list[Grid]:
    """All tables of a result file, in the order in which they are shown."""
    metrics = measure(results)
    grids = [*main_grids(metrics), speed_grid(metrics), acceptance_grid(metrics)]
    for dataset in _datasets(metrics):
        by_category = [one for one in measure(results, by_category=True) if one.dataset == dataset]
        if len({one.category for one in by_category}) > 1:
            grids.append(category_grid(dataset, by_category))
    return grids


def legend(results: Results) -> str:
    """What the columns mean, and the arm whose text is not the target's."""
    return f"{LEGEND}\n{PAPER}" if "quantized" in results.run.config.arms else LEGEND


def main_grids(metrics: Sequence[ArmMetrics]) -> list[Grid]:
    """The paper's table: a row per arm, a column pair per dataset, the mean last."""
    datasets = _datasets(metrics)
    parts = [datasets[i : i + DATASETS_PER_TABLE] for i in range(0, len(datasets), DATASETS_PER_TABLE)]
    return [_main_grid(metrics, part, with_mean=len(datasets) > 1 and part is parts[-1]) for part in parts]


def _main_grid(metrics: Sequence[ArmMetrics], datasets: Sequence[str], with_mean: bool) -> Grid:
    columns = [Column("arm", number=False)]
    for group in [*datasets, *(["mean"] if with_mean else [])]:
        columns += [Column("speedup", group), Column("len", group)]
    by_place = {(metric.arm, metric.dataset): metric for metric in metrics}
    rows = []
    for mean in mean_over_datasets(metrics):
        row = [mean.arm]
        for metric in (by_place.get((mean.arm, dataset)) for dataset in datasets):
            row += [_speedup(metric), as_ratio(metric.acceptance_length)] if metric else ["–", "–"]
        if with_mean:
            row += [as_ratio(mean.speedup, unit="×"), as_ratio(mean.acceptance_length)]
        rows.append(row)
    return Grid("Speedup and acceptance length", columns, rows)


def speed_grid(metrics: Sequence[ArmMetrics]) -> Grid:
    """Speed in both definitions, and on how many questions the text is vanilla's."""
    heads = ["tokens/s", "speedup", "95 % interval", "by question", "95 % interval", "= vanilla"]
    columns = [Column("dataset", number=False), Column("arm", number=False), *map(Column, heads)]
    rows = [
        [
            metric.dataset,
            metric.arm,
            as_ratio(metric.tokens_per_s, 1),
            _speedup(metric),
            _interval(metric, metric.speedup_total),
            _times(metric, metric.speedup_mean),
            _interval(metric, metric.speedup_mean),
            _identical(metric),
        ]
        for metric in metrics
    ]
    return Grid("Speed (by question: mean over questions of tokens/s ÷ vanilla's)", columns, rows)


def acceptance_grid(metrics: Sequence[ArmMetrics]) -> Grid:
    """Counts and their ratios: acceptance length in three definitions, acceptance rate, confirm rate."""
    heads = ["tokens", "steps", "len", "by question", "vLLM's", "accepted", "confirmed", "failed"]
    columns = [Column("dataset", number=False), Column("arm", number=False), *map(Column, heads)]
    rows = [
        [
            metric.dataset,
            metric.arm,
            str(metric.new_tokens),
            str(metric.steps),
            as_ratio(metric.acceptance_length),
            as_ratio(metric.acceptance_length_mean),
            as_ratio(metric.acceptance_length_vllm),
            as_ratio(metric.acceptance_rate),
            as_ratio(metric.confirm_rate),
            str(metric.failed),
        ]
        for metric in metrics
    ]
    title = "Acceptance (len: in total; by question: the mean of their own; vLLM's: drafted steps only)"
    return Grid(title, columns, rows)


def category_grid(dataset: str, metrics: Sequence[ArmMetrics]) -> Grid:
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
            row += [_speedup(metric), as_ratio(metric.acceptance_length)] if metric else ["–", "–"]
        rows.append(row)
    return Grid(f"{dataset} by category", columns, rows)


def comparison_grids(comparison: Comparison) -> list[Grid]:
    """What changed between two runs, and the settings in which they differ."""
    columns = [Column("dataset", number=False), Column("arm", number=False), Column("quantity", number=False)]
    columns += [Column("before"), Column("after"), Column("ratio")]
    rows = [
        [
            change.dataset,
            change.arm,
            change.quantity,
            as_ratio(change.before),
            as_ratio(change.after),
            as_ratio(change.ratio, 3),
        ]
        for change in comparison.changes
    ]
    grids = [Grid("Changes", columns, rows)]
    if comparison.settings:
        heads = [Column(name, number=False) for name in ("setting", "before", "after")]
        settings = [[_setting(value) for value in setting] for setting in comparison.settings]
        grids.append(Grid("Settings that differ", heads, settings))
    return grids


def as_table(grid: Grid) -> Table:
    """The grid for a terminal: the first line of a head once for the columns it spans, a repeated first cell blank."""
    two_lines = any(column.group for column in grid.columns)
    table = FittedTable(title=grid.title)
    previous = ""
    for column in grid.columns:
        top = column.group if column.group != previous else ""
        head = f"{top}\n{column.name}" if two_lines else column.name
        table.add_column(escape(head), justify="right" if column.number else "left")
        previous = column.group
    first = None
    for row in grid.rows:
        table.add_row("" if row[0] == first else escape(row[0]), *map(escape, row[1:]))
        first = row[0]
    return table


def as_markdown(grid: Grid) -> str:
    """The grid as a Markdown table under its title."""
    heads = [f"{column.group} {column.name}".strip() for column in grid.columns]
    rules = ["---:" if column.number else ":---" for column in grid.columns]
    lines = [heads, rules, *grid.rows]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"**{grid.title}**\n\n{body}\n"


def as_csv(results: Results) -> str:
    """One line for each dataset and arm, then one for each category and arm; numbers at full precision."""
    records = [as_record(metric) for by_category in (False, True) for metric in measure(results, by_category)]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(records[0]) if records else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def as_record(metric: ArmMetrics) -> dict[str, Any]:
    """The metrics of an arm, flat: an interval becomes two numbers."""
    record = asdict(metric)
    for name in ("speedup_mean", "speedup_total"):
        estimate: Estimate | None = getattr(metric, name)
        low, high = estimate.interval if estimate and estimate.interval else (None, None)
        record |= {name: estimate.value if estimate else None, f"{name}_low": low, f"{name}_high": high}
        record[f"{name}_shown"] = estimate.is_shown if estimate else None
    return record


def describe_errors(results: Results) -> str:
    """One sentence on the answers that failed; empty where none did."""
    errors = results.errors
    if not errors:
        return ""
    first = errors[0]
    return (
        f"{len(errors)} of {len(results.rows)} answers failed; the first: "
        f"{first.dataset} question {first.question_id}, {first.arm}: {first.error}"
    )


def describe_divergences(results: Results) -> str:
    """One sentence on arms that promise the target's output and left vanilla's; empty where none did."""
    count = len(results.divergences)
    if not count:
        return ""
    answers = "1 answer leaves" if count == 1 else f"{count} answers leave"
    unexplained = sum(not divergence.near_tie for divergence in results.divergences)
    if unexplained:
        verdict = f"at {unexplained} of those places the target's two best logits lie further apart, which is a defect"
    else:
        verdict = "everywhere there the target's two best logits lie within it"
    return f"{answers} vanilla's text, which the rounding of {results.run.dtype} may cause: {verdict}."


def describe_run(results: Results) -> str:
    """One line: what ran where."""
    run = results.run
    verifier = f" with {run.verifier}" if run.verifier else ""
    return f"{run.model}{verifier}, {run.dtype} on {run.device}, temperature {run.config.temperature:g}"


def describe_conditions(results: Results) -> str:
    """How busy the machine was, its cores' frequency, and how much vanilla's speed varied; empty where not known."""
    found = conditions(results)
    parts = []
    if found.others is not None and found.most_others is not None:
        parts.append(
            f"other programs took {100 * found.others:.0f} % of the cores, at most {100 * found.most_others:.0f}"
        )
    if found.mhz:
        parts.append("cores at {:.0f} to {:.0f} MHz".format(*found.mhz))
    if found.reference_spread is not None:
        parts.append(f"vanilla's speed varied by {100 * found.reference_spread:.0f} % between answers")
    busy = f"The machine was busy during {found.busy} of {found.answers} answers: measure again on a quiet one. "
    return (busy if found.was_busy else "") + ("Conditions: " + "; ".join(parts) + "." if parts else "")


def _datasets(metrics: Sequence[ArmMetrics]) -> list[str]:
    return list(dict.fromkeys(metric.dataset for metric in metrics))


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "–" if value is None else str(value)


def _speedup(metric: ArmMetrics) -> str:
    """The headline: of total tokens ÷ total seconds."""
    return _times(metric, metric.speedup_total)


def _times(metric: ArmMetrics, estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    doubt = "" if estimate.is_shown or metric.arm == BASELINE else DOUBT
    return f"{estimate.value:.2f}×{doubt}"


def _interval(metric: ArmMetrics, estimate: Estimate | None) -> str:
    if estimate is None or estimate.interval is None or metric.arm == BASELINE:
        return "–"
    return "{:.2f}–{:.2f}".format(*estimate.interval)


def _identical(metric: ArmMetrics) -> str:
    if metric.identical is None or metric.arm == BASELINE:
        return "–"
    return f"{metric.identical}/{metric.questions}"
