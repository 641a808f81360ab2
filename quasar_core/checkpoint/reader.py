"""Read a verifier checkpoint, strictly: what does not fit the format is refused in one sentence."""

from pathlib import Path

import torch

from quasar_core.checkpoint.card import parse_card
from quasar_core.checkpoint.compressed_tensors import CompressedTensorsFormat, PackedWeight
from quasar_core.checkpoint.formats import PACKED_SUFFIXES, GptqFormat, parse_format
from quasar_core.checkpoint.gptq_format import QuantizedWeight, join_outputs
from quasar_core.checkpoint.gptqmodel_names import own_layers
from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.errors import QuasarError
from quasar_core.files import is_file, is_folder
from quasar_core.records import FidelityReport
from quasar_core.store.model_config import read_text_config, read_text_headers

CPU = torch.device("cpu")
_EIGHT_BITS = ("I8", "F8_E4M3")  # as safetensors names what a weight that was never quantized is not stored in


class VerifierCheckpoint:
    """A quantized checkpoint's folder: config, format, packed layers, the tensors that stayed as they were."""

    def __init__(self, folder: Path) -> None:
        if not is_folder(folder):
            raise QuasarError(f"The verifier's folder {folder} does not exist.")
        if not is_file(folder / "config.json"):
            raise QuasarError(
                f"{folder} holds no verifier: it has no config.json. A verifier is a folder that `quasar quantize` "
                "wrote, or a checkpoint that another program quantized."
            )
        self.folder = folder
        self.config = read_text_config(folder)
        self.format = parse_format(folder, self.config)
        self.tensors = TensorFiles(folder)
        self._stored_parts = self._find_layers()
        self._refuse_parts()
        self.card, self._card = parse_card(folder / "quasar.json")

    def _refuse_parts(self) -> None:
        """A layer of which the marker alone is missing would be taken for one that was never quantized."""
        layers = set(self.file_layers)
        for entry in read_text_headers(self.folder):
            layer, _, suffix = entry.name.rpartition(".")
            belongs = suffix in self.format.only_packed or (suffix == "weight" and entry.dtype in _EIGHT_BITS)
            if belongs and layer not in layers:
                raise QuasarError(f"The checkpoint's layer {layer} has no {self.format.marker}.")

    def _find_layers(self) -> dict[str, tuple[str, ...]]:
        marker = f".{self.format.marker}"
        names = [name.removesuffix(marker) for name in self.tensors.names() if name.endswith(marker)]
        if not isinstance(self.format, GptqFormat):
            return {name: (name,) for name in names}
        return own_layers(names, self.architecture)

    @property
    def architecture(self) -> str:
        """The class of the model, or of its text part, as config.json names it; "" where it names none."""
        return next(iter(self.config.get("architectures") or ()), "")

    @property
    def layer_names(self) -> list[str]:
        """Modules whose weight is packed, such as `model.layers.0.mlp.up_proj`, by the model's own names."""
        return list(self._stored_parts)

    def parts(self, layer: str) -> tuple[str, ...]:
        """The layers in the files that a layer is: GPTQModel has others for some families (`gptqmodel_names.py`)."""
        return self._stored_parts[layer]

    @property
    def file_layers(self) -> list[str]:
        """Modules whose weight is packed, by the names in the files, sorted."""
        return sorted(part for parts in self._stored_parts.values() for part in parts)

    @property
    def packed_names(self) -> list[str]:
        """Tensors that are part of a packed weight."""
        names = (f"{layer}.{suffix}" for layer in self.file_layers for suffix in self.format.suffixes)
        return [name for name in names if name in self.tensors]

    @property
    def plain_names(self) -> list[str]:
        """Tensors that are not: norms, biases, the embedding."""
        packed = set(self.packed_names)
        return [name for name in self.tensors.names() if name not in packed]

    def describe_zeros(self) -> str | None:
        """How GPTQ's zeros are read, told by the first quantized layer; None in another format, or without layers."""
        if not isinstance(self.format, GptqFormat) or not self._stored_parts:
            return None
        name = self.file_layers[0]
        shapes = {
            part: self.tensors.shape(f"{name}.{part}") for part in PACKED_SUFFIXES if f"{name}.{part}" in self.tensors
        }
        return self.format.describe_zeros(self.tensors.load(f"{name}.qzeros"), self.format.layout(name, shapes).bits)

    @property
    def own_norms(self) -> bool:
        """Whether norms may differ from the target's: SmoothQuant and AWQ put their factors into them."""
        return not isinstance(self.format, GptqFormat)

    @property
    def fidelity(self) -> FidelityReport | None:
        """The report that quantizing wrote; None in a checkpoint of another tool."""
        return self._card.report.fidelity if self._card.report else None

    @property
    def target_fingerprint(self) -> str | None:
        """The fingerprint of the target it was made from; None in a checkpoint of another tool."""
        return self._card.target.fingerprint if self._card.target else None

    def layer(self, name: str, device: torch.device = CPU) -> PackedWeight:
        """One layer's weight, unpacked and checked; integer codes on the device, since billions take a GPU no time."""
        parts = [self._file_layer(part, device) for part in self.parts(name)]
        integers = [part for part in parts if isinstance(part, QuantizedWeight)]
        if len(integers) < 2:
            return parts[0]
        try:
            return join_outputs(integers)
        except ValueError as error:
            raise QuasarError(f"{' and '.join(self.parts(name))} are one layer of the model, and {error}.") from error

    def _file_layer(self, name: str, device: torch.device) -> PackedWeight:
        place = CPU if isinstance(self.format, CompressedTensorsFormat) else device
        parts = {s: f"{name}.{s}" for s in self.format.suffixes if f"{name}.{s}" in self.tensors}
        read = dict(self.tensors.load_many([*parts.values()]))
        weight = self.format.unpack(name, {s: read[full].to(place) for s, full in parts.items()})
        self.tensors.let_go(parts.values())
        return weight
