"""`quasar inspect`: what a verifier checkpoint holds and how faithful it is."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quasar_cli import console
from quasar_cli.commands.doctor import describe_speed
from quasar_cli.options import Device, Json, Threads, TrustRemoteCode, Verbose, use_threads
from quasar_core import store
from quasar_core.errors import UsageError
from quasar_core.files import absolute, is_folder

if TYPE_CHECKING:
    from quasar_core.checkpoint.headers import StoredLayer
    from quasar_core.checkpoint.reader import VerifierCheckpoint


def inspect(
    checkpoint: Annotated[
        str | None,
        typer.Argument(metavar="CHECKPOINT", help="A verifier's folder or a pair's name; default: the current pair."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="MODEL", help="Measure fidelity to this model, on --text; any checkpoint."),
    ] = None,
    text: Annotated[
        str | None, typer.Option("--text", metavar="FILE", help="A text or JSONL file, wikitext2 or c4.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw fidelity into a PNG or SVG (needs matplotlib).")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all weights, and say whether they are as quantize wrote them.")
    ] = False,
    device: Device = "auto",
    threads: Threads = "auto",
    trust_remote_code: TrustRemoteCode = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint holds and how faithful it is; with --against and --text, measure it on a text."""
    if (against is None) != (text is None):
        raise UsageError("--against MODEL and --text FILE go together.")
    use_threads(threads)
    from quasar_core.checkpoint.reader import VerifierCheckpoint

    if plot is not None:
        from quasar_core.bench.plots import new_figure

        new_figure(plot, "--plot")  # refused before minutes of measuring, not after
    folder = _folder(checkpoint)
    found = VerifierCheckpoint(folder)
    digest = {"digest": _digest(found)} if verify else {}
    description = {**describe(found), **digest, "speed": describe_speed(folder)}
    if against is not None and text is not None:
        description["measured"] = _measure(against, folder, text, device, trust_remote_code)
    if plot is not None:
        _plot(description, plot)
    if as_json:
        console.print_json(description)
        return

    from quasar_cli.render.doctor import speed_tables
    from quasar_cli.render.quantize import inspection_tables

    console.show(*inspection_tables(description, verbose), *speed_tables(description["speed"]))
    if "measured" in description:
        from quasar_cli.render.fidelity import measured_tables

        console.show(*measured_tables(description["measured"]))


def _digest(checkpoint: "VerifierCheckpoint") -> str:
    """What checking the weights found, in words."""
    from quasar_core.checkpoint.checks import check_digest

    with console.progress_bar() as progress:
        return check_digest(checkpoint, progress)


def _measure(model: str, folder: Path, text: str, device: str, trust_remote_code: bool) -> dict[str, Any]:
    """The fidelity report on a text, as JSON."""
    from quasar_core import api

    with console.progress_bar() as progress:
        report = api.fidelity_on_text(
            model, folder, text, device=device, trust_remote_code=trust_remote_code, progress=progress
        )
    return asdict(report)


def _plot(description: dict[str, Any], path: Path) -> None:
    """Draw what was measured just now, else what quantizing measured."""
    from quasar_core.bench.plots import plot_fidelity
    from quasar_core.records import FidelityReport

    report = description["report"] or {}
    fidelity = description.get("measured") or report.get("fidelity")
    if fidelity is None:
        raise UsageError("--plot: no fidelity of this checkpoint is known; measure it by --against MODEL --text FILE.")
    name = Path(description["checkpoint"]).name
    plot_fidelity(FidelityReport.from_dict(fidelity), report.get("layer_errors", {}), name, path)
    console.note_plain(f"Drawn into {path}.")


def describe(checkpoint: "VerifierCheckpoint") -> dict[str, Any]:
    """The JSON form: from the configs, quasar.json and the headers of the safetensors files."""
    from quasar_core.checkpoint.headers import describe_marlin, stored_layers
    from quasar_core.checkpoint.loaders import describe_loaders
    from quasar_core.checkpoint.reader import GPTQ_METHODS
    from quasar_core.models.lean_weights import check_fits

    sizes = {entry.name: entry for entry in store.read_headers(checkpoint.folder)}
    plain = set(checkpoint.plain_names)
    packed = {name: entry for name, entry in sizes.items() if name not in plain}
    packed_bytes = sum(entry.size for entry in packed.values())
    layers = stored_layers(checkpoint)
    check_fits(checkpoint, layers)
    weights = sum(layer.weights for layer in layers)
    section = checkpoint.config.get("quantization_config") or {
        "bits": checkpoint.format.bits,
        "group_size": checkpoint.format.group_size,
    }
    is_gptq = section.get("quant_method", "gptq") in GPTQ_METHODS
    target = checkpoint.card.get("target") or {}
    return {
        "checkpoint": str(checkpoint.folder),
        "target": target.get("name"),
        "architecture": ", ".join(checkpoint.config.get("architectures") or ["unknown"]),
        "quantization": section,
        "marlin": describe_marlin(layers, section.get("sym", True)) if is_gptq else None,
        "zeros": checkpoint.describe_zeros(),
        "loaders": describe_loaders(layers, section),
        "packed_layers": len(checkpoint.layer_names),
        "layers": [_describe_layer(layer, packed) for layer in layers],
        "bits_per_weight": packed_bytes * 8 / weights if weights else 0.0,
        "bytes": {"packed": packed_bytes, "plain": sum(sizes[name].size for name in plain)},
        "calibration": checkpoint.card.get("calibration"),
        "versions": checkpoint.card.get("versions"),
        "report": checkpoint.card.get("report"),
    }


def _describe_layer(layer: "StoredLayer", packed: dict[str, "store.TensorEntry"]) -> dict[str, Any]:
    """Bits, group size and bytes of a quantized layer."""
    size = sum(entry.size for name, entry in packed.items() if name.rpartition(".")[0] == layer.name)
    return {"name": layer.name, "bits": layer.bits, "group_size": layer.group_size, "bytes": size}


def _folder(checkpoint: str | None) -> Path:
    """The folder that was named, by its path or by a pair's name; else the current pair's."""
    if checkpoint is None:
        current = store.current_pair()
        if current is None:
            raise UsageError("No pair is current: name a CHECKPOINT, or make one with `quasar quantize MODEL`.")
        return Path(current.verifier)
    folder = absolute(Path(checkpoint))
    if is_folder(folder):
        return folder
    return Path(store.find_pair(checkpoint).verifier)
