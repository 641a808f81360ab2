"""Draw figures, with matplotlib: of a bench's results, of a verifier's fidelity, and of the costs of passes."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from quasar_core.bench.arms import BASELINE
from quasar_core.bench.metrics import measure
from quasar_core.bench.results import Results
from quasar_core.bench.steps import REFERENCE, StepReport
from quasar_core.errors import QuasarError, UsageError, foreign_errors
from quasar_core.files import refuse_foreign, written_whole
from quasar_core.records import FidelityReport, FidelitySlice, MarginTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
MARK = "quasar, by matplotlib"
_HEAD_BYTES = 4096  # where PNG and SVG tell what wrote them


def plot(results: Results, path: Path) -> None:
    """Draw the figure into `path`, PNG or SVG by its suffix.

    Raises UsageError for another suffix and for a file that quasar did not draw, QuasarError where matplotlib is
    missing or the file cannot be written.
    """
    figure = new_figure(path, "--output")
    left, right = figure.subplots(1, 2)
    _draw_speedups(left, results)
    _draw_accepted(right, results)
    figure.suptitle(f"{results.run.model} · {results.run.device} · temperature {results.run.config.temperature:g}")
    save_figure(figure, path)


def new_figure(path: Path, flag: str) -> "Figure":
    """An empty figure for a file that `flag` names; raises as `plot` does."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{flag} must end in {' or '.join(SUFFIXES)}, not {path.name}.")
    refuse_foreign(path, flag, "a figure that quasar drew", _is_ours)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise QuasarError("Drawing needs matplotlib: pip install 'quasar-cli[plots]'.") from error
    return Figure(figsize=(11, 4.5), layout="constrained")


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure, PNG or SVG by the suffix, whole or not at all; it tells that quasar drew it."""
    kind = path.suffix.lower().removeprefix(".")
    with foreign_errors(f"{path} could not be written"), written_whole(path) as beside:
        figure.savefig(beside, dpi=150, format=kind, metadata={"Software" if kind == "png" else "Creator": MARK})


def _is_ours(path: Path) -> bool:
    """Whether a file begins with our mark among what it tells of itself."""
    with path.open("rb") as file:
        return MARK.encode() in file.read(_HEAD_BYTES)


def _draw_speedups(axes: "Axes", results: Results) -> None:
    """A group of bars for each dataset, a bar for each arm but vanilla, which is the line at 1."""
    metrics = measure(results)
    datasets = list(dict.fromkeys(metric.dataset for metric in metrics))
    arms = [arm for arm in results.run.config.arms if arm != BASELINE]
    places = _bar_places(len(arms))
    for number, arm in enumerate(arms):
        drawn = [metric for metric in metrics if metric.arm == arm and metric.speedup_total is not None]
        at = [datasets.index(metric.dataset) + places[number] for metric in drawn]
        estimates = [metric.speedup_total for metric in drawn if metric.speedup_total is not None]
        heights = [estimate.value for estimate in estimates]
        # With few questions a skewed interval may lie beside its value.
        ends = [estimate.interval or (estimate.value, estimate.value) for estimate in estimates]
        below = [max(0.0, height - low) for height, (low, _) in zip(heights, ends, strict=True)]
        above = [max(0.0, high - height) for height, (_, high) in zip(heights, ends, strict=True)]
        axes.bar(at, heights, 0.75 / len(arms), yerr=[below, above], capsize=3, color=_colour(results, arm), label=arm)
    axes.axhline(1, color="0.4", linewidth=1, linestyle="--")
    axes.set_xticks(range(len(datasets)), datasets)
    axes.set_title("Speedup over vanilla (95 % interval)", fontsize="medium")
    _add_legend(axes)


def _draw_accepted(axes: "Axes", results: Results) -> None:
    """For each arm that drafted, the share of its steps that accepted 0, 1, 2, … draft tokens."""
    from matplotlib.ticker import MaxNLocator

    counts = {arm: accepted_per_step(results, arm) for arm in results.run.config.arms}
    drafting = {arm: of_arm for arm, of_arm in counts.items() if of_arm}
    places = _bar_places(len(drafting))
    for (arm, of_arm), place in zip(drafting.items(), places, strict=True):
        lengths = range(max(of_arm) + 1)
        shares = [100 * of_arm[length] / sum(of_arm.values()) for length in lengths]
        axes.bar(
            [length + place for length in lengths], shares, 0.75 / len(drafting), color=_colour(results, arm), label=arm
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Draft tokens accepted by a step (% of steps)", fontsize="medium")
    _add_legend(axes)


def _bar_places(count: int) -> list[float]:
    """Offsets from the middle of a group for `count` bars side by side."""
    return [(number - (count - 1) / 2) * 0.8 / count for number in range(count)]


def _colour(results: Results, arm: str) -> str:
    """The same in both halves of the figure."""
    return f"C{results.run.config.arms.index(arm)}"


def _add_legend(axes: "Axes") -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def accepted_per_step(results: Results, arm: str) -> Counter[int]:
    """How many steps of `arm` accepted 0, 1, 2, … tokens; empty for an arm that never drafted."""
    steps = [step for row in results.rows if row.arm == arm and row.stats for step in row.stats.step_log]
    return Counter(step.accepted for step in steps) if any(step.drafted for step in steps) else Counter()


if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_fidelity(fidelity: FidelityReport, losses: Mapping[str, float], name: str, path: Path) -> None:
    """Draw the figure into `path`, PNG or SVG by its suffix; raises as `plots.plot` does."""
    figure = new_figure(path, "--plot")
    figure.set_size_inches(11, 8)
    (top_left, top_right), (low_left, low_right) = figure.subplots(2, 2)
    _draw_margins(top_left, fidelity.margins)
    _draw_slices(top_right, "by position of the token", fidelity.by_position)
    _draw_slices(low_left, "by kind of token", fidelity.by_kind)
    _draw_losses(low_right, losses)
    figure.suptitle(f"{name} · agreement {fidelity.agreement:.4f} · mean KL {fidelity.kl_mean:.4f} nats")
    save_figure(figure, path)


def _draw_margins(axes: "Axes", margins: MarginTable) -> None:
    """P(agree | margin), each bin at its lower edge."""
    points = [
        (low, agreed / count)
        for low, count, agreed in zip([0.0, *margins.edges], margins.counts, margins.agreed, strict=True)
        if count
    ]
    axes.step([low for low, _ in points], [share for _, share in points], where="post")
    axes.set(xlabel="margin of the verifier's two best logits (nats)", ylabel="P(agree)", title="margin curve")


def _draw_slices(axes: "Axes", title: str, slices: list[FidelitySlice]) -> None:
    """A bar of mean KL for each part."""
    axes.bar([part.name for part in slices], [part.kl_mean for part in slices])
    axes.tick_params(axis="x", rotation=30)
    axes.set(ylabel="mean KL (nats)", title=f"KL {title}")


def _draw_losses(axes: "Axes", losses: Mapping[str, float]) -> None:
    """The relative error of every layer, in the order of the model; a line for each kind of layer."""
    kinds: dict[str, list[float]] = {}
    for name, loss in losses.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(loss)
    for kind, values in kinds.items():
        axes.plot(range(len(values)), values, marker=".", label=kind)
    if kinds:
        axes.set_yscale("log")
        axes.legend(fontsize="small")
    axes.set(xlabel="block", ylabel="relative error", title="error by layer")


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
