"""Draw how faithful a verifier is: by layer, by position, by kind of token, and what the kernel in use adds."""

from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from quasar_cli.render import as_bytes, facts_table, number_table
from quasar_core.records import FidelityReport, FidelitySlice, KernelPrice, MarginTable


def fidelity_facts(fidelity: FidelityReport) -> list[tuple[str, str]]:
    """How faithful the verifier is, on text that the calibration did not see."""
    facts = [
        ("agreement", f"{fidelity.agreement:.4f} on greedy text, {fidelity.agreement_sampled:.4f} on sampled text"),
        ("KL(target‖verifier)", f"{fidelity.kl_mean:.4f} nats, 99th percentile {fidelity.kl_p99:.4f}"),
        ("perplexity", f"{fidelity.perplexity_target:.3f} target, {fidelity.perplexity_verifier:.3f} verifier"),
        ("measured on", f"{fidelity.tokens} tokens: {fidelity.text}"),
    ]
    if fidelity.agreement_beside is not None:
        facts.insert(1, ("agreement in exact", f"{fidelity.agreement_beside:.4f} on greedy text"))
    return facts + ([("kernel in use", kernel_price(fidelity.in_use))] if fidelity.in_use else [])


def kernel_price(price: KernelPrice) -> str:
    """The divergence that the kernel adds to that of the codes."""
    return (
        f"{price.kernel}: KL {price.kl_mean:.4f}, agreement {price.agreement:.4f} on {price.tokens} sampled tokens; "
        f"with dequantized weights {price.kl_mean_exact:.4f} and {price.agreement_exact:.4f}"
    )


def slices_table(title: str, what: str, slices: Sequence[FidelitySlice]) -> Table:
    """Agreement and KL, a row per part of the text."""
    table = number_table(title, what, "tokens", "agreement", "mean KL")
    for part in slices:
        table.add_row(part.name, str(part.tokens), f"{part.agreement:.4f}", f"{part.kl_mean:.4f}")
    return table


def margins_table(margins: MarginTable) -> Table:
    """P(agree | margin), a row per bin."""
    table = number_table("P(agree | margin)", "margin (nats)", "tokens", "agree")
    lows, highs = [0.0, *margins.edges], [*margins.edges, None]
    for low, high, count, agreed in zip(lows, highs, margins.counts, margins.agreed, strict=True):
        span = f"{low:.2f} to {high:.2f}" if high is not None else f"{low:.2f} and more"
        table.add_row(span, str(count), f"{agreed / count:.3f}" if count else "–")
    return table


def fidelity_tables(fidelity: FidelityReport) -> list[RenderableType]:
    """Tables by position, by kind of token, by margin; what an older report does not hold is left out."""
    tables: list[RenderableType] = []
    if fidelity.by_position:
        tables.append(slices_table("By position", "position of the token", fidelity.by_position))
    if fidelity.by_kind:
        tables.append(slices_table("By kind of token", "kind", fidelity.by_kind))
    return [*tables, margins_table(fidelity.margins)]


def measured_tables(measured: dict[str, Any]) -> list[RenderableType]:
    """What was measured on a user's text, where every token counts for the agreement."""
    fidelity = FidelityReport.from_dict(measured)
    facts = [(name, value) for name, value in fidelity_facts(fidelity) if name != "agreement"]
    table = facts_table([("agreement", f"{fidelity.agreement:.4f}"), *facts])
    return [table, *fidelity_tables(fidelity)]


def layers_table(layers: Sequence[dict[str, Any]], losses: dict[str, float], count: int) -> Table:
    """The layers with the largest reconstruction error, the worst first; in order where no error is known."""
    shown = sorted(layers, key=lambda layer: -losses.get(layer["name"], 0.0))[:count]
    title = "Layers by error" if count >= len(layers) else "Largest errors"
    table = number_table(title if losses else "Layers", "layer", "bits", "group", "bytes", "relative error")
    for layer in shown:
        loss = losses.get(layer["name"])
        table.add_row(
            escape(layer["name"]),
            str(layer["bits"]),
            "output" if layer["group_size"] == -1 else str(layer["group_size"]),
            as_bytes(layer["bytes"]),
            "–" if loss is None else f"{loss:.4f}",
        )
    return table
