"""`quasar inspect`: what a verifier checkpoint holds and how faithful it is."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quasar_cli import console
from quasar_cli.options import Json, Verbose
from quasar_core import store
from quasar_core.errors import UsageError

if TYPE_CHECKING:
    from quasar_core.checkpoint.reader import VerifierCheckpoint


def inspect(
    checkpoint: Annotated[
        str | None,
        typer.Argument(metavar="CHECKPOINT", help="A verifier's folder or a pair's name; default: the current pair."),
    ] = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint holds and how faithful it is; no weights are loaded."""
    from quasar_core.checkpoint.reader import VerifierCheckpoint

    description = describe(VerifierCheckpoint(_folder(checkpoint)))
    if as_json:
        console.print_json(description)
        return

    from quasar_cli.render.checkpoint import inspection_tables

    console.show(*inspection_tables(description, verbose))


def describe(checkpoint: "VerifierCheckpoint") -> dict[str, Any]:
    """The JSON form: from the configs, quasar.json and the headers of the safetensors files."""
    sizes = {entry.name: entry for entry in store.read_headers(checkpoint.folder)}
    plain = set(checkpoint.plain_names)
    packed_bytes = sum(entry.size for name, entry in sizes.items() if name not in plain)
    weights = sum(_weights(sizes, layer, checkpoint.format.bits) for layer in checkpoint.layer_names)
    target = checkpoint.card.get("target") or {}
    return {
        "checkpoint": str(checkpoint.folder),
        "target": target.get("name"),
        "architecture": ", ".join(checkpoint.config.get("architectures") or ["unknown"]),
        "quantization": checkpoint.config.get("quantization_config") or {"bits": checkpoint.format.bits},
        "packed_layers": len(checkpoint.layer_names),
        "bits_per_weight": packed_bytes * 8 / weights if weights else 0.0,
        "bytes": {"packed": packed_bytes, "plain": sum(sizes[name].size for name in plain)},
        "calibration": checkpoint.card.get("calibration"),
        "versions": checkpoint.card.get("versions"),
        "report": checkpoint.card.get("report"),
    }


def _weights(entries: dict[str, store.TensorEntry], layer: str, bits: int) -> int:
    """Weights of a packed layer: the inputs are the length of g_idx, else they follow from the packing."""
    words, outputs = entries[f"{layer}.qweight"].shape
    g_idx = entries.get(f"{layer}.g_idx")
    return (g_idx.shape[0] if g_idx else words * 32 // bits) * outputs


def _folder(checkpoint: str | None) -> Path:
    """The folder that was named, by its path or by a pair's name; else the current pair's."""
    if checkpoint is None:
        current = store.current_pair()
        if current is None:
            raise UsageError("No pair is current: name a CHECKPOINT, or make one with `quasar quantize MODEL`.")
        return Path(current.verifier)
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        return folder.resolve()
    return Path(store.find_pair(checkpoint).verifier)
