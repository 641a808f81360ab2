"""A figure of a result file: speedup with intervals, and how many tokens a step accepted. Needs matplotlib."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from quasar_core.bench.arms import BASELINE
from quasar_core.bench.metrics import measure
from quasar_core.bench.results import Results
from quasar_core.errors import QuasarError, UsageError
from quasar_core.foreign import foreign_errors
from quasar_core.writing import refuse_foreign, written_whole

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
