"""A figure of a verifier's fidelity: the margin curve, KL by position and by kind, loss by layer. Needs matplotlib."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from quasar_core.bench.plots import new_figure, save_figure
from quasar_core.records import FidelityReport, FidelitySlice, MarginTable

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
