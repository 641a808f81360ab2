"""Draw figures, with matplotlib: of a bench's results, of a verifier's fidelity, and of the costs of passes."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quasar_core.bench.arms import BASELINE, TWIN
from quasar_core.bench.metrics.arm_metrics import ArmMetrics, measure
from quasar_core.bench.results import Results, temperatures
from quasar_core.bench.steps import REFERENCE, StepReport
from quasar_core.errors import QuasarError, UsageError, foreign_errors
from quasar_core.files import refuse_foreign, written_whole
from quasar_core.records import FidelityReport, FidelitySlice, MarginTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 16  # accepted tokens of a step that are drawn by themselves
SUFFIXES = (".png", ".svg")
MARK = "quasar, by matplotlib"
_LEGEND_WIDTH = 110  # characters
_HEAD_BYTES = 4096  # where PNG and SVG tell what wrote them


# Okabe and Ito's colours, which all kinds of colour vision tell apart; marks and lines differ too, for print in grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#8C7A00")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "**")


def plot(results: Results, path: Path) -> None:
    """Draw the figure into `path`, PNG or SVG by its suffix.

    Raises UsageError for another suffix and for a file that quasar did not draw, QuasarError where matplotlib is
    missing or the file cannot be written.
    """
    figure = new_figure(path, "--output")
    left, right = figure.subplots(1, 2)
    draw_speedups(left, results)
    draw_accepted(right, results)
    run = results.run
    _title(figure, f"{run.model} · {run.dtype} on {run.device} · {temperatures(run)}")
    _legend_below(figure, left, right, said=_whose_text(results))
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
    return Figure(figsize=(11, 4.8), layout="constrained")


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure, PNG or SVG by the suffix, whole or not at all; it tells that quasar drew it."""
    kind = path.suffix.lower().removeprefix(".")
    with foreign_errors(f"{path} could not be written"), written_whole(path) as beside:
        figure.savefig(beside, dpi=150, format=kind, metadata={"Software" if kind == "png" else "Creator": MARK})


def _is_ours(path: Path) -> bool:
    """Whether a file begins with our mark among what it tells of itself."""
    with path.open("rb") as file:
        return MARK.encode() in file.read(_HEAD_BYTES)


def _title(figure: "Figure", text: str) -> None:
    figure.suptitle(text, fontsize="medium")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)


def _legend_below(figure: "Figure", *drawn: "Axes", said: Mapping[str, str] | None = None) -> None:
    """One legend for all parts, under them, where it hides nothing; `said` is what it says in place of a label."""
    handles = {label: handle for axes in drawn for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if handles:
        texts = [(said or {}).get(label, label) for label in handles]
        columns = max(1, _LEGEND_WIDTH // (max(map(len, texts)) + 5))
        figure.legend(list(handles.values()), texts, loc="outside lower center", ncols=columns, frameon=False)


def draw_speedups(axes: "Axes", results: Results) -> None:
    """A group of bars for each dataset and temperature, a bar for each arm but vanilla, which is the line at 1."""
    metrics = [metric for metric in measure(results) if metric.arm != TWIN]
    groups = list(dict.fromkeys(map(_group, metrics)))
    arms = [arm for arm in results.run.config.arms if arm not in (BASELINE, TWIN)]
    places = _bar_places(len(arms))
    for number, arm in enumerate(arms):
        drawn = [metric for metric in metrics if metric.arm == arm and metric.speedup_total is not None]
        at = [groups.index(_group(metric)) + places[number] for metric in drawn]
        estimates = [metric.speedup_total for metric in drawn if metric.speedup_total is not None]
        heights = [estimate.value for estimate in estimates]
        # With few questions a skewed interval may lie beside its value.
        ends = [estimate.interval or (estimate.value, estimate.value) for estimate in estimates]
        below = [max(0.0, height - low) for height, (low, _) in zip(heights, ends, strict=True)]
        above = [max(0.0, high - height) for height, (_, high) in zip(heights, ends, strict=True)]
        error = {"elinewidth": 1, "ecolor": "0.25"}
        look = _look(results, arm)
        axes.bar(at, heights, 0.75 / len(arms), yerr=[below, above], capsize=2, error_kw=error, label=arm, **look)
        for place, estimate, height in zip(at, estimates, above, strict=True):
            said = "wide" if estimate.is_uncertain else f"{estimate.value:.2f}{'' if estimate.is_shown else '?'}"
            top, behind = (place, estimate.value + height), {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            axes.annotate(said, top, (0, 3), textcoords="offset points", ha="center", bbox=behind)
    axes.margins(y=0.1)  # room for the numbers
    axes.axhline(1, color="0.3", linewidth=1, linestyle="--", label=BASELINE)
    axes.set_xticks(range(len(groups)), [_group_label(group, metrics) for group in groups], fontsize="small")
    axes.set(xlabel="dataset (n questions)", ylabel=f"speedup over {BASELINE} (×), 95 % interval")


def _group(metric: ArmMetrics) -> tuple[str, float]:
    return metric.dataset, metric.temperature


def _group_label(group: tuple[str, float], metrics: list[ArmMetrics]) -> str:
    """The dataset, with the temperature where there are several, and the number of its questions."""
    name, temperature = group
    several = len({metric.temperature for metric in metrics}) > 1
    asked = max(metric.questions for metric in metrics if _group(metric) == group)
    return f"{name}{f', T = {temperature:g}' if several else ''}\n(n = {asked})"


def _whose_text(results: Results) -> dict[str, str]:
    """What the legend says of each arm: in how many answers its text is plain decoding's, where that is known."""
    said = {BASELINE: f"{BASELINE}: plain decoding"}
    metrics = measure(results)
    for arm in results.run.config.arms:
        known = [metric for metric in metrics if metric.arm == arm and metric.identical is not None]
        if arm != BASELINE and known:
            same = sum(metric.identical or 0 for metric in known)
            said[arm] = f"{arm}: same text in {same} of {sum(metric.questions for metric in known)}"
    return said


def draw_accepted(axes: "Axes", results: Results) -> None:
    """For each arm that drafted, the share of its steps that accepted 0, 1, 2, … draft tokens; `MOST` are many."""
    counts = {arm: accepted_per_step(results, arm) for arm in results.run.config.arms if arm != TWIN}
    drafting = {arm: of_arm for arm, of_arm in counts.items() if of_arm}
    places = _bar_places(len(drafting))
    for (arm, of_arm), place in zip(drafting.items(), places, strict=True):
        lengths = range(min(max(of_arm), MOST) + 1)
        many = sum(count for length, count in of_arm.items() if length >= MOST)
        shown = [many if length == MOST else of_arm[length] for length in lengths]
        shares = [100 * count / sum(of_arm.values()) for count in shown]
        at = [length + place for length in lengths]
        axes.bar(at, shares, 0.75 / len(drafting), label=arm, **_look(results, arm))
    longest = min(max((max(of_arm) for of_arm in drafting.values()), default=0), MOST)
    ticks = range(0, longest + 1, 1 if longest < MOST // 2 else 2)
    axes.set_xticks(ticks, [f"{tick} or more" if tick == MOST else str(tick) for tick in ticks])
    steps = sum(sum(of_arm.values()) for of_arm in drafting.values())
    axes.set(xlabel="draft tokens accepted in a step", ylabel=f"share of an arm's steps (%), n = {steps:,}")


def _bar_places(count: int) -> list[float]:
    """Offsets from the middle of a group for `count` bars side by side."""
    return [(number - (count - 1) / 2) * 0.8 / count for number in range(count)]


def _look(results: Results, arm: str) -> dict[str, Any]:
    """An arm's colour and hatching, the same in both halves of the figure."""
    number = results.run.config.arms.index(arm) % len(COLOURS)
    return {"color": COLOURS[number], "hatch": HATCHES[number], "edgecolor": "white", "linewidth": 0.5}


def accepted_per_step(results: Results, arm: str) -> Counter[int]:
    """How many steps of `arm` accepted 0, 1, 2, … tokens; empty for an arm that never drafted."""
    steps = [step for row in results.rows if row.arm == arm and row.stats for step in row.stats.step_log]
    return Counter(step.accepted for step in steps) if any(step.drafted for step in steps) else Counter()


def plot_fidelity(fidelity: FidelityReport, losses: Mapping[str, float], name: str, path: Path) -> None:
    """Draw the figure into `path`, PNG or SVG by its suffix; raises as `plot` does."""
    figure = new_figure(path, "--plot")
    figure.set_size_inches(11, 8.5)
    (top_left, top_right), (low_left, low_right) = figure.subplots(2, 2)
    _draw_slices(top_right, "position of the token", fidelity.by_position)
    _draw_slices(low_left, "kind of token", fidelity.by_kind)
    _draw_losses(low_right, losses)
    said = f"{name} · agreement {fidelity.agreement:.4f} · mean KL {fidelity.kl_mean:.4f} nats"
    _title(figure, f"{said} · {fidelity.tokens:,} tokens of {fidelity.text}")
    _draw_margins(top_left, fidelity.margins)
    save_figure(figure, path)


def _draw_margins(axes: "Axes", margins: MarginTable) -> None:
    """P(agree | margin), each bin at its lower edge; in grey behind it the tokens of each bin."""
    bins = zip([0.0, *margins.edges], margins.counts, margins.agreed, strict=True)
    points = [(low, count, agreed / count) for low, count, agreed in bins if count]
    lows, counts = [low for low, _, _ in points], [count for _, count, _ in points]
    axes.step(lows, [share for _, _, share in points], where="post", color=COLOURS[0], linewidth=2, label="agreement")
    axes.set_xscale("symlog", linthresh=margins.edges[0] if margins.edges else 1.0)
    ticks = [0, *(tick for tick in (0.1, 1, 10) if tick <= max(lows, default=0))]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set(
        xlabel="margin of the verifier's two best logits (nats)", ylabel="share of tokens that agree", ylim=(0, 1.02)
    )
    behind = axes.twinx()
    behind.step(lows, counts, where="post", color="0.55", linewidth=1, linestyle="--", label="tokens")
    behind.set(ylabel=f"tokens of a bin (dashed), n = {sum(counts):,}", ylim=(0, None))
    behind.spines["top"].set_visible(False)


def _draw_slices(axes: "Axes", what: str, slices: list[FidelitySlice]) -> None:
    """A bar of mean KL for each part, the first on top."""
    names = [f"{part.name}\n(n = {part.tokens:,})" for part in slices]
    axes.barh(names, [part.kl_mean for part in slices], color=COLOURS[0])
    axes.invert_yaxis()
    axes.set(xlabel="mean KL(target‖verifier) (nats)", ylabel=f"{what} (n tokens)")


def _draw_losses(axes: "Axes", losses: Mapping[str, float]) -> None:
    """The relative error of every layer, in the order of the model; a line for each kind of layer."""
    kinds: dict[str, list[float]] = {}
    for name, loss in losses.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(loss)
    for number, (kind, values) in enumerate(kinds.items()):
        axes.plot(range(len(values)), values, markersize=4, linewidth=1, label=kind, **_line(number))
    if kinds:
        axes.set_yscale("log")
        axes.legend(fontsize="small", frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.set(xlabel="block", ylabel="relative output error of a layer")


def _line(number: int) -> dict[str, Any]:
    """Colour, mark and line of the lines of a figure."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKS[number % len(MARKS)],
        "linestyle": LINES[number % len(LINES)],
    }


def draw_steps(report: StepReport, path: Path) -> None:
    """Milliseconds by tokens, a line for each model and a band for its floor, into `path` (PNG or SVG)."""
    figure = new_figure(path, "--plot")
    axes = figure.subplots()
    for number, name in enumerate(dict.fromkeys(row.model for row in report.rows)):
        rows = sorted((row for row in report.rows if row.model == name), key=lambda row: row.tokens)
        tokens = [row.tokens for row in rows]
        axes.plot(tokens, [row.ms for row in rows], label=_label(name, rows[0].kernel), **_line(number))
        if name != REFERENCE:  # its floor is the target's
            floors = [row.floor_ms for row in rows], [row.slow_floor_ms for row in rows]
            look: dict[str, Any] = {"facecolor": "none", "edgecolor": COLOURS[number], "hatch": HATCHES[number + 1]}
            axes.fill_between(tokens, *floors, linewidth=0.5, label=f"{name}: floor of memory", **look)
    axes.set_ylim(bottom=0)
    axes.set_xticks(report.config.tokens)
    axes.set_xlabel(f"tokens of a pass, after a context of {report.config.context}")
    axes.set_ylabel(f"time of a pass (ms), median of {report.config.rounds}")
    _title(figure, f"{report.name} · {report.dtype} on {report.device} · {report.layers} of {report.all_layers} layers")
    _legend_below(figure, axes)
    save_figure(figure, path)


def _label(model: str, kernel: str) -> str:
    return kernel if model == REFERENCE else f"{model} ({kernel})"
