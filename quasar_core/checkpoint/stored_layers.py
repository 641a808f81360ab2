"""The sizes of a checkpoint's quantized layers, from the headers of its files alone."""

from collections.abc import Mapping
from dataclasses import dataclass

from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.store.safetensors_header import TensorEntry, read_headers


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
    bits, size = checkpoint.format.bits, checkpoint.format.group_size
    if f"{name}.qweight" not in entries:  # compressed-tensors: outputs first
        packed = entries.get(f"{name}.weight_packed")
        outputs, inputs = (packed or entries[f"{name}.weight"]).shape
        return StoredLayer(name, inputs * 32 // bits if packed else inputs, outputs, bits, size)
    words, outputs = entries[f"{name}.qweight"].shape
    g_idx = entries.get(f"{name}.g_idx")
    inputs = g_idx.shape[0] if g_idx and g_idx.shape[0] else words * 32 // bits
    groups = entries[f"{name}.scales"].shape[0]
    if size == -1 or groups != -(-inputs // size):
        size = -1 if groups == 1 else inputs // groups
    return StoredLayer(name, inputs, outputs, words * 32 // inputs, size)
