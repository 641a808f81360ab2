"""Draw tables about checkpoints: what quantizing would need, what it made, what a folder holds, which pairs exist."""

import os
from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from quasar_cli.render import as_bytes, facts_table, number_table, text_table
from quasar_cli.render.fidelity import fidelity_facts, fidelity_tables, layers_table
from quasar_core.config import QuantizeConfig
from quasar_core.quantize.estimate import about
from quasar_core.quantize.plan import Plan
from quasar_core.records import FidelityReport, QuantizeReport
from quasar_core.store import PairRecord
from quasar_core.system import Load


def plan_table(plan: Plan) -> Table:
    """The plan's figures, and what is free here."""
    states = as_bytes(plan.activations)
    facts = [
        ("checkpoint", f"{as_bytes(plan.checkpoint)}, {plan.bits_per_weight:.2f} bits per weight of the packed layers"),
        ("disk at the most", f"{as_bytes(plan.disk)}{_free(plan.free_disk)}"),
        ("memory at the most", f"{as_bytes(plan.host)}{_free(plan.free_host)}"),
    ]
    if plan.device:
        facts.append(("GPU memory at the most", f"{as_bytes(plan.device)}{_free(plan.free_device)}, on one GPU"))
    facts += [
        ("hidden states", f"{states}, {'in a file' if plan.spilled else 'in memory'}"),
        ("the model writes", _what_is_written(plan)),
    ]
    if plan.seconds is not None:
        facts.append(("time", f"{about(plan.seconds)}, {_on_what_machine(plan)}"))
    if plan.whole_because:
        facts.append(("held as a whole", f"yes, since {plan.whole_because}"))
    return facts_table(facts)


def _what_is_written(plan: Plan) -> str:
    text = "its calibration and its greedy text" if plan.writes_calibration else "its greedy text"
    where = "on the GPU, which holds it as a whole" if plan.text.on_device else "on the CPU"
    rows = f"{plan.text_rows} rows at once" if plan.text_rows > 1 else "a row at a time"
    spare = "; --calibration FILE spares most of it" if plan.writes_calibration else ""
    return f"{text}, {where}, {plan.text.describe()}, {rows}{spare}"


def _on_what_machine(plan: Plan) -> str:
    load = Load(plan.others)
    if not load.is_busy:
        return "if nothing else runs"
    return f"as far as a busy machine can tell ({load.describe()})"


def _free(count: int | None) -> str:
    return "" if count is None else f" ({as_bytes(count)} free here)"


_WORST_LAYERS = 5
FULL_ROWS = QuantizeConfig().fidelity_rows


def report_tables(report: QuantizeReport, verbose: bool) -> list[RenderableType]:
    """The summary of a quantization; with `verbose`, the error of every layer."""
    smaller = report.bytes_before / report.bytes_after
    facts = [
        ("target", report.target),
        ("verifier", report.checkpoint),
        ("size", f"{as_bytes(report.bytes_before)} → {as_bytes(report.bytes_after)} ({smaller:.2f} times smaller)"),
        ("bits per weight", f"{report.bits_per_weight:.2f}"),
        *fidelity_facts(report.fidelity),
        *quick_facts(report.config),
        *rounded_facts(report.rounded_layers, verbose),
        *((f"seconds: {stage}", f"{seconds:.1f}") for stage, seconds in report.seconds.items()),
    ]
    tables: list[RenderableType] = [facts_table(facts)]
    if verbose:
        tables.append(errors_table(report.layer_errors, len(report.layer_errors)))
    return tables


def quick_facts(config: dict[str, Any]) -> list[tuple[str, str]]:
    """That little text was read, where --quick asked for that."""
    rows = config.get("fidelity_rows", FULL_ROWS)
    if rows >= FULL_ROWS:
        return []
    read = f"{config['samples']} texts of {config['seq_len']} tokens"
    return [
        ("quick", f"calibrated on {read}, fidelity measured on {rows} rows of text: without --quick both are surer")
    ]


def rounded_facts(names: Sequence[str], verbose: bool) -> list[tuple[str, str]]:
    """Layers of experts that read too little text; with `verbose`, all of them by name."""
    if not names:
        return []
    shown = names if verbose else [*names[:3], *(["…"] if len(names) > 3 else [])]
    return [("rounded to nearest", f"{len(names)} layers of experts that read too little text: {', '.join(shown)}")]


def errors_table(errors: dict[str, float], count: int = _WORST_LAYERS) -> Table:
    """The layers with the largest reconstruction error, the worst first."""
    shown = sorted(errors.items(), key=lambda item: -item[1])[:count]
    title = "Layers by error" if len(shown) == len(errors) else "Largest errors"
    table = number_table(title, "layer", "relative error")
    for name, error in shown:
        table.add_row(escape(name), f"{error:.4f}")
    return table


def inspection_tables(description: dict[str, Any], verbose: bool) -> list[RenderableType]:
    """What `inspect` found in a checkpoint."""
    sizes = description["bytes"]
    facts = [
        ("checkpoint", description["checkpoint"]),
        ("target", description["target"] or "not recorded"),
        ("architecture", description["architecture"]),
        ("codes", _codes(description["quantization"])),
        *([("zeros", description["zeros"])] if description.get("zeros") else []),
        *([("runs on Marlin", description["marlin"])] if description["marlin"] else []),
        *((f"loads in {name}", verdict) for name, verdict in description["loaders"].items()),
        ("layers packed", str(description["packed_layers"])),
        ("bits per weight", f"{description['bits_per_weight']:.2f} of the packed layers"),
        ("size", f"{as_bytes(sizes['packed'])} packed, {as_bytes(sizes['plain'])} as they were"),
        *([("digest", description["digest"])] if "digest" in description else []),
    ]
    if description["calibration"]:
        facts.append(
            ("calibration", ", ".join(f"{name} {value}" for name, value in description["calibration"].items()))
        )
    report = description["report"]
    layers = description["layers"]
    count = len(layers) if verbose else _WORST_LAYERS
    if report is None:
        unknown = (
            "fidelity",
            "not measured: quasar did not write this checkpoint; --against MODEL --text FILE measures it",
        )
        return [facts_table([*facts, unknown]), layers_table(layers, {}, count)]
    fidelity = FidelityReport.from_dict(report["fidelity"])
    return [
        facts_table([*facts, *fidelity_facts(fidelity)]),
        layers_table(layers, report["layer_errors"], count),
        *fidelity_tables(fidelity),
    ]


def pairs_table(pairs: Sequence[PairRecord], current: PairRecord | None) -> Table:
    """The recorded pairs, the current one marked."""
    table = text_table(None, "", "pair", "target", "verifier")
    for pair in pairs:
        missing = "" if os.path.isdir(pair.verifier) else " (missing)"
        table.add_row(
            "*" if pair == current else "", escape(pair.name), escape(pair.target), escape(pair.verifier) + missing
        )
    return table


def _codes(quantization: dict[str, Any]) -> str:
    if quantization.get("quant_method") == "compressed-tensors":
        return f"compressed-tensors, {quantization.get('format')}"
    group = quantization.get("group_size", -1)
    symmetry = "symmetric" if quantization.get("sym", not quantization.get("zero_point")) else "asymmetric"
    groups = "one group per output" if group == -1 else f"groups of {group}"
    others = f", other widths by {len(rules)} rules" if (rules := quantization.get("dynamic")) else ""
    return f"{quantization.get('quant_method', 'gptq')}, {quantization['bits']} bits, {groups}, {symmetry}{others}"
