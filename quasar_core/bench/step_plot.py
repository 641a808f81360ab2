"""A figure of the costs of passes over their floors. Needs matplotlib."""

from pathlib import Path

from quasar_core.bench.plots import new_figure, save_figure
from quasar_core.bench.step_lineup import REFERENCE
from quasar_core.bench.steps import StepReport


def draw_steps(report: StepReport, path: Path) -> None:
    """Milliseconds by tokens, a line for each model and a band for its floor, into `path` (PNG or SVG)."""
    figure = new_figure(path, "--plot")
    axes = figure.subplots()
    for number, name in enumerate(dict.fromkeys(row.model for row in report.rows)):
        rows = sorted((row for row in report.rows if row.model == name), key=lambda row: row.tokens)
        tokens = [row.tokens for row in rows]
        axes.plot(tokens, [row.ms for row in rows], marker="o", color=f"C{number}", label=_label(name, rows[0].kernel))
        if name != REFERENCE:  # its floor is the target's
            floors = [row.floor_ms for row in rows], [row.slow_floor_ms for row in rows]
            axes.fill_between(tokens, *floors, color=f"C{number}", alpha=0.3, label=f"floor of the {name}")
    axes.set_ylim(bottom=0)
    axes.set_xticks(report.config.tokens)
    axes.set_xlabel("tokens of a pass")
    axes.set_ylabel("ms")
    axes.legend(frameon=False)
    axes.set_title(f"{report.name} · {report.dtype} · {report.device} · context {report.config.context}")
    save_figure(figure, path)


def _label(model: str, kernel: str) -> str:
    return kernel if model == REFERENCE else f"{model} ({kernel})"
