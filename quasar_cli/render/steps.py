"""Draw the tables of `bench steps`: what passes cost."""

from collections.abc import Sequence

from quasar_cli.render import as_bytes, as_ratio
from quasar_cli.render.grids import Column, Grid
from quasar_core.bench.steps import REFERENCE, StepReport, StepRow

LEGEND = (
    "ms: median of interleaved rounds, all logits included\n"
    "floor: bytes of the pass ÷ the higher and the lower bandwidth; ×: ms ÷ the floor of the higher\n"
    "outside products: share of the first pass that is not spent in matrix products"
)


def step_grids(report: StepReport) -> list[Grid]:
    """What a pass costs by its tokens, and what it reads with which kernel."""
    models = list(dict.fromkeys(row.model for row in report.rows))
    return [_cost_grid(report, models), _bytes_grid(report, models)]


def _cost_grid(report: StepReport, models: Sequence[str]) -> Grid:
    columns = [Column("tokens")]
    for model in models:
        names = ("ms",) if model == REFERENCE else ("ms", "floor", "×")
        columns += [Column(name, model) for name in names]
    by_place = {(row.model, row.tokens): row for row in report.rows}
    rows = [
        [str(count), *(cell for model in models for cell in _cost_cells(by_place[model, count]))]
        for count in report.config.tokens
    ]
    return Grid(f"A pass of T tokens after {report.config.context}: {_describe_layers(report)}", columns, rows)


def _cost_cells(row: StepRow) -> list[str]:
    if row.model == REFERENCE:
        return [_ms(row.ms)]
    return [_ms(row.ms), f"{_ms(row.floor_ms)} to {_ms(row.slow_floor_ms)}", as_ratio(row.ratio)]


def _bytes_grid(report: StepReport, models: Sequence[str]) -> Grid:
    columns = [
        Column("model", number=False),
        Column("bytes of the first pass"),
        Column("outside products"),
        Column("kernel", number=False),
    ]
    first = {model: next(row for row in report.rows if row.model == model) for model in models}
    rows = [[model, as_bytes(row.bytes), _share(row.outside), row.kernel] for model, row in first.items()]
    low, high = sorted(report.bandwidth)
    return Grid(f"What a pass reads, at {as_bytes(low)}/s to {as_bytes(high)}/s measured in this run", columns, rows)


def describe_run(report: StepReport) -> str:
    """One line: what ran where."""
    return f"{report.name}, {report.dtype} on {report.device}, {report.config.rounds} rounds"


def _describe_layers(report: StepReport) -> str:
    if report.layers == report.all_layers:
        return f"{report.layers} layers and the head"
    return f"{report.layers} of the {report.all_layers} layers and the head"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _ms(value: float) -> str:
    """Three figures: 0.123, 4.56, 78.9, 1234."""
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 1000 else 0
    return f"{value:.{digits}f}"
