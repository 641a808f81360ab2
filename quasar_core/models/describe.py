"""Describe a verifier checkpoint by its configs, its card and the headers of its files."""

from typing import Any

from quasar_core.checkpoint.formats import GPTQ_METHODS
from quasar_core.checkpoint.headers import StoredLayer, describe_marlin, model_layers, stored_layers
from quasar_core.checkpoint.loaders import describe_loaders
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.models.weights.lean_weights import check_fits
from quasar_core.store import TensorEntry, read_text_headers


def describe(checkpoint: VerifierCheckpoint) -> dict[str, Any]:
    """The JSON form: from the configs, quasar.json and the headers of the safetensors files."""
    sizes = {entry.name: entry for entry in read_text_headers(checkpoint.folder)}
    packed = {name: sizes[name] for name in checkpoint.packed_names}
    packed_bytes = sum(entry.size for entry in packed.values())
    layers = stored_layers(checkpoint)
    check_fits(checkpoint, model_layers(checkpoint))
    weights = sum(layer.weights for layer in layers)
    section = checkpoint.config.get("quantization_config") or {
        "bits": checkpoint.format.bits,
        "group_size": checkpoint.format.group_size,
    }
    is_gptq = section.get("quant_method", "gptq") in GPTQ_METHODS
    target = checkpoint.card.get("target") or {}
    architectures = checkpoint.config.get("architectures") or ["unknown"]
    return {
        "checkpoint": str(checkpoint.folder),
        "target": target.get("name"),
        "architecture": ", ".join(architectures),
        "quantization": section,
        "marlin": describe_marlin(layers, section.get("sym", True)) if is_gptq else None,
        "zeros": checkpoint.describe_zeros(),
        "loaders": describe_loaders(layers, section, architectures[0]),
        "packed_layers": len(layers),
        "layers": [_describe_layer(layer, packed) for layer in layers],
        "bits_per_weight": packed_bytes * 8 / weights if weights else 0.0,
        "bytes": {"packed": packed_bytes, "plain": sum(entry.size for entry in sizes.values()) - packed_bytes},
        "calibration": checkpoint.card.get("calibration"),
        "versions": checkpoint.card.get("versions"),
        "report": checkpoint.card.get("report"),
    }


def _describe_layer(layer: StoredLayer, packed: dict[str, TensorEntry]) -> dict[str, Any]:
    """Bits, group size and bytes of a quantized layer."""
    size = sum(entry.size for name, entry in packed.items() if name.rpartition(".")[0] == layer.name)
    return {"name": layer.name, "bits": layer.bits, "group_size": layer.group_size, "bytes": size}
