"""A verifier checkpoint: what quantizing made, what a folder holds, which pairs there are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from quasar_cli.render import as_bytes, facts_table, number_table, text_table
from quasar_core.records import FidelityReport, MarginTable, QuantizeReport
from quasar_core.store import PairRecord

_WORST_LAYERS = 5


def report_tables(report: QuantizeReport, verbose: bool) -> list[RenderableType]:
    """The summary of a quantization; with `verbose`, the error of every layer."""
    smaller = report.bytes_before / report.bytes_after
    facts = [
        ("target", report.target),
        ("verifier", report.checkpoint),
        ("size", f"{as_bytes(report.bytes_before)} → {as_bytes(report.bytes_after)} ({smaller:.2f} times smaller)"),
        ("bits per weight", f"{report.bits_per_weight:.2f}"),
        *fidelity_facts(report.fidelity),
        *((f"seconds: {stage}", f"{seconds:.1f}") for stage, seconds in report.seconds.items()),
    ]
    tables: list[RenderableType] = [facts_table(facts)]
    if verbose:
        tables.append(layers_table(report.layer_errors, len(report.layer_errors)))
    return tables


def fidelity_facts(fidelity: FidelityReport) -> list[tuple[str, str]]:
    """How faithful the verifier is, on text that the calibration did not see."""
    return [
        ("agreement", f"{fidelity.agreement:.4f} on greedy text, {fidelity.agreement_sampled:.4f} on sampled text"),
        ("KL(target‖verifier)", f"{fidelity.kl_mean:.4f} nats, 99th percentile {fidelity.kl_p99:.4f}"),
        ("perplexity", f"{fidelity.perplexity_target:.3f} target, {fidelity.perplexity_verifier:.3f} verifier"),
        ("measured on", f"{fidelity.tokens} tokens: {fidelity.text}"),
    ]


def layers_table(errors: dict[str, float], count: int = _WORST_LAYERS) -> Table:
    """The layers with the largest reconstruction error, the worst first."""
    shown = sorted(errors.items(), key=lambda item: -item[1])[:count]
    title = "Layers by error" if len(shown) == len(errors) else "Largest errors"
    table = number_table(title, "layer", "relative error")
    for name, error in shown:
        table.add_row(escape(name), f"{error:.4f}")
    return table


def margins_table(margins: MarginTable) -> Table:
    """P(agree | margin), a row per bin."""
    table = number_table("P(agree | margin)", "margin (nats)", "tokens", "agree")
    lows, highs = [0.0, *margins.edges], [*margins.edges, None]
    for low, high, count, agreed in zip(lows, highs, margins.counts, margins.agreed, strict=True):
        span = f"{low:.2f} to {high:.2f}" if high is not None else f"{low:.2f} and more"
        table.add_row(span, str(count), f"{agreed / count:.3f}" if count else "–")
    return table


def inspection_tables(description: dict[str, Any], verbose: bool) -> list[RenderableType]:
    """What `inspect` found in a checkpoint."""
    sizes = description["bytes"]
    facts = [
        ("checkpoint", description["checkpoint"]),
        ("target", description["target"] or "not recorded"),
        ("architecture", description["architecture"]),
        ("codes", _codes(description["quantization"])),
        ("layers packed", str(description["packed_layers"])),
        ("bits per weight", f"{description['bits_per_weight']:.2f} of the packed layers"),
        ("size", f"{as_bytes(sizes['packed'])} packed, {as_bytes(sizes['plain'])} as they were"),
    ]
    if description["calibration"]:
        facts.append(
            ("calibration", ", ".join(f"{name} {value}" for name, value in description["calibration"].items()))
        )
    report = description["report"]
    if report is None:
        return [facts_table([*facts, ("fidelity", "not measured: quasar did not write this checkpoint")])]
    fidelity = FidelityReport.from_dict(report["fidelity"])
    errors = report["layer_errors"]
    return [
        facts_table([*facts, *fidelity_facts(fidelity)]),
        layers_table(errors, len(errors) if verbose else _WORST_LAYERS),
        margins_table(fidelity.margins),
    ]


def pairs_table(pairs: Sequence[PairRecord], current: PairRecord | None) -> Table:
    """The recorded pairs, the current one marked."""
    table = text_table(None, "", "pair", "target", "verifier")
    for pair in pairs:
        missing = "" if Path(pair.verifier).is_dir() else " (missing)"
        table.add_row(
            "*" if pair == current else "", escape(pair.name), escape(pair.target), escape(pair.verifier) + missing
        )
    return table


def _codes(quantization: dict[str, Any]) -> str:
    group = quantization.get("group_size", -1)
    symmetry = "symmetric" if quantization.get("sym", True) else "asymmetric"
    groups = "one group per output" if group == -1 else f"groups of {group}"
    return f"{quantization.get('quant_method', 'gptq')}, {quantization['bits']} bits, {groups}, {symmetry}"
