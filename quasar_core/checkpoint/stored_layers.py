"""The sizes of a checkpoint's quantized layers, from the headers of its files alone."""

from collections.abc import Mapping
from dataclasses import dataclass

from quasar_core.checkpoint.reader import QuantizationFormat, VerifierCheckpoint
from quasar_core.store.safetensors_header import TensorEntry, read_headers

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
    """Every quantized layer, by name; layers of widths of their own are told by their shapes."""
    entries = {entry.name: entry for entry in read_headers(checkpoint.folder)}
    return [_stored(entries, name, checkpoint) for name in checkpoint.layer_names]


def _stored(entries: Mapping[str, TensorEntry], name: str, checkpoint: VerifierCheckpoint) -> StoredLayer:
    form = checkpoint.format
    parts = {s: entries[f"{name}.{s}"] for s in form.suffixes if f"{name}.{s}" in entries}
    if isinstance(form, QuantizationFormat):
        form.check_parts(name, {s: (entry.shape, _DTYPES.get(entry.dtype, entry.dtype)) for s, entry in parts.items()})
    shapes = {s: entry.shape for s, entry in parts.items()}
    layout = form.layout(name, shapes)
    return StoredLayer(name, layout.in_features, layout.out_features, layout.bits, layout.group_size)
