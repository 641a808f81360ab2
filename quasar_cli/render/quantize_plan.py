"""What a quantization would take, as `quasar quantize --dry-run` shows it."""

from rich.table import Table

from quasar_cli.render import as_bytes, facts_table
from quasar_core.quantize.duration import about
from quasar_core.quantize.plan import Plan
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
    if plan.text_on_device:
        return f"{text}, on the GPU, which holds it as a whole"
    spare = ": --calibration FILE spares most of it" if plan.writes_calibration else ""
    return f"{text}, on the CPU, from its files; slow where memory cannot cache them{spare}"


def _on_what_machine(plan: Plan) -> str:
    load = Load(plan.others)
    if not load.is_busy:
        return "if nothing else runs"
    return f"as far as a busy machine can tell ({load.describe()})"


def _free(count: int | None) -> str:
    return "" if count is None else f" ({as_bytes(count)} free here)"
