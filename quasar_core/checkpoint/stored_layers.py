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
    form = checkpoint.format
    shapes = {s: entries[f"{name}.{s}"].shape for s in form.suffixes if f"{name}.{s}" in entries}
    layout = form.layout(name, shapes)
    return StoredLayer(name, layout.in_features, layout.out_features, layout.bits, layout.group_size)
