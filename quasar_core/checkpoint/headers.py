"""Read the sizes of a checkpoint's quantized layers from its files' headers, and whether Marlin runs them.

Marlin is the fastest 4-bit kernel on NVIDIA GPUs. The rules of its two users, as of late 2026: vLLM
(`layers/quantization/utils/marlin_utils.py`) asks for symmetric codes of 4 or 8 bits; groups of 32, 64, 128 or one per
output; outputs a multiple of 64 and inputs of 128 (so of every group too). GPTQModel (`nn_modules/qlinear/marlin.py`):
the same bits, groups and symmetry, any sizes. What satisfies vLLM satisfies both.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from quasar_core.checkpoint.compressed_tensors import CompressedTensorsFormat
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.store.model_config import read_text_headers
from quasar_core.store.safetensors_header import TensorEntry

# As a safetensors header names what a layer's tensors may be, and as torch does.
_DTYPES = {"I32": "int32", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32"}


@dataclass(frozen=True)
class StoredLayer:
    """A quantized layer; a group size of −1 is one scale per output."""

    name: str
    in_features: int
    out_features: int
    bits: int
    group_size: int

    @property
    def weights(self) -> int:
        """How many weights the codes stand for."""
        return self.in_features * self.out_features


def stored_layers(checkpoint: VerifierCheckpoint) -> list[StoredLayer]:
    """Every quantized layer as it is stored, by name; layers of widths of their own are told by their shapes."""
    entries = {entry.name: entry for entry in read_text_headers(checkpoint.folder)}
    return [_stored(entries, name, checkpoint) for name in checkpoint.file_layers]


def model_layers(checkpoint: VerifierCheckpoint) -> list[StoredLayer]:
    """Every quantized layer by the model's own names: with one that is stored in parts as a whole."""
    stored = {layer.name: layer for layer in stored_layers(checkpoint)}
    found = []
    for name in checkpoint.layer_names:
        parts = [stored[part] for part in checkpoint.parts(name)]
        found.append(replace(parts[0], name=name, out_features=sum(part.out_features for part in parts)))
    return found


def _stored(entries: Mapping[str, TensorEntry], name: str, checkpoint: VerifierCheckpoint) -> StoredLayer:
    form = checkpoint.format
    parts = {s: entries[f"{name}.{s}"] for s in form.suffixes if f"{name}.{s}" in entries}
    if not isinstance(form, CompressedTensorsFormat):
        form.check_parts(name, {s: (entry.shape, _DTYPES.get(entry.dtype, entry.dtype)) for s, entry in parts.items()})
    shapes = {s: entry.shape for s, entry in parts.items()}
    layout = form.layout(name, shapes)
    return StoredLayer(name, layout.in_features, layout.out_features, layout.bits, layout.group_size)


BITS = (4, 8)
GROUP_SIZES = (-1, 32, 64, 128)
TILE_INPUTS, TILE_OUTPUTS = 128, 64


class Codes(Protocol):
    """What the rules ask of a layer's codes; a group size of −1 is one scale per output."""

    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def bits(self) -> int: ...
    @property
    def group_size(self) -> int: ...


def why_not_marlin(layer: Codes, sym: bool) -> str | None:
    """Why vLLM runs a layer of these codes on another kernel, or None where it takes Marlin."""
    if not sym:
        return "its codes are asymmetric"
    if layer.bits not in BITS:
        return f"it takes 4 and 8 bits, not {layer.bits}"
    if layer.group_size not in GROUP_SIZES:
        return f"it takes groups of 32, 64, 128 or a whole row, not {layer.group_size}"
    if layer.in_features % TILE_INPUTS:
        return f"{layer.in_features} inputs are not a multiple of {TILE_INPUTS}"
    if layer.out_features % TILE_OUTPUTS:
        return f"{layer.out_features} outputs are not a multiple of {TILE_OUTPUTS}"
    return None


def describe_marlin(layers: Iterable[StoredLayer], sym: bool) -> str:
    """One phrase for a checkpoint."""
    reasons = [(layer.name, reason) for layer in layers if (reason := why_not_marlin(layer, sym)) is not None]
    if not reasons:
        return "yes"
    (name, reason), more = reasons[0], len(reasons) - 1
    return f"no: {reason} ({name}" + (f" and {more} more)" if more else ")")
