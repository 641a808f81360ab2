"""Read a verifier checkpoint, strictly: what does not fit the format is refused in one sentence."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from quasar_core.checkpoint.compressed_tensors import METHOD as COMPRESSED_TENSORS
from quasar_core.checkpoint.compressed_tensors import CompressedTensorsFormat, PackedWeight
from quasar_core.checkpoint.packing import QuantizedWeight, count_groups, unpack_weight
from quasar_core.config import BITS
from quasar_core.errors import QuasarError
from quasar_core.records import FidelityReport
from quasar_core.store.safetensors_header import weight_files

CPU = torch.device("cpu")
CARD_VERSION = 1  # of quasar.json
PACKED_SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


class TensorFiles:
    """The safetensors files of a folder as one mapping from name to tensor, read on demand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where: dict[str, Path] = {}
        files = weight_files(folder)
        if not files:
            raise QuasarError(f"{folder} holds no safetensors files.")
        for path in files:
            with _open(path) as file:
                self._where.update(dict.fromkeys(file.keys(), path))

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._where)

    def load(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        if name not in self._where:
            raise QuasarError(f"{self.folder} holds no tensor {name}.")
        with _open(self._where[name]) as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

    def load_many(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors file by file, each file opened once."""
        for path in sorted({self._where[name] for name in names}):
            with _open(path) as file:
                for name in names:
                    if self._where[name] == path:
                        yield name, file.get_tensor(name)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise QuasarError(f"{path} is not a readable safetensors file ({error}).") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or one sentence that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise QuasarError(f"{path} does not exist.") from error
    except (OSError, ValueError) as error:
        raise QuasarError(f"{path} is not readable JSON ({error}).") from error
    if not isinstance(content, dict):
        raise QuasarError(f"{path} does not hold a JSON object.")
    return content


@dataclass(frozen=True)
class QuantizationFormat:
    """GPTQ's format: the part of `quantization_config` that reading depends on."""

    bits: int
    group_size: int
    zeros_offset: int

    marker = "qweight"  # every quantized layer has one
    suffixes = PACKED_SUFFIXES

    @classmethod
    def parse(cls, folder: Path, section: dict[str, Any]) -> "QuantizationFormat":
        """From `quantization_config`; QuasarError for what this version does not read."""
        bits, group_size = section.get("bits"), section.get("group_size", -1)
        if bits not in BITS:
            raise QuasarError(f"{folder} has {bits}-bit codes, which this version does not read.")
        if not isinstance(group_size, int) or (group_size != -1 and group_size < 1):
            raise QuasarError(f"{folder} has groups of {group_size}, which this version does not read.")
        if section.get("pack_dtype", "int32") != "int32":
            raise QuasarError(f"{folder} packs codes into {section['pack_dtype']}, which this version does not read.")
        version = section.get("checkpoint_format", "gptq")
        if version not in ("gptq", "gptq_v2"):
            raise QuasarError(f"{folder} has the checkpoint format {version}, which this version does not read.")
        offset = 1 if version == "gptq" else 0
        return cls(bits, group_size, offset)

    def unpack(self, name: str, tensors: dict[str, torch.Tensor]) -> QuantizedWeight:
        """Read a layer's tensors strictly.

        Bits and group size follow from the shapes, so that layers of their own (`dynamic`) need no table.
        """
        if not {"qweight", "scales"} <= tensors.keys() or not tensors.get("g_idx", torch.empty(0)).numel():
            return unpack_weight(name, tensors, self.bits, self.group_size, self.zeros_offset)
        in_features, groups = tensors["g_idx"].shape[0], tensors["scales"].shape[0]
        bits = tensors["qweight"].shape[0] * 32 // in_features
        if bits not in BITS:
            raise QuasarError(f"The checkpoint's layer {name} has {bits}-bit codes, which this version does not read.")
        size = self.group_size
        if groups != count_groups(in_features, size) and in_features % groups == 0:
            size = -1 if groups == 1 else in_features // groups
        return unpack_weight(name, tensors, bits, size, self.zeros_offset)


def parse_format(folder: Path, config: dict[str, Any]) -> QuantizationFormat | CompressedTensorsFormat:
    """The format by config.json's `quantization_config`, or by quantize_config.json beside it."""
    section = config.get("quantization_config")
    if section is None and (folder / "quantize_config.json").exists():
        section = read_json(folder / "quantize_config.json")
    if section is None:
        raise QuasarError(f"{folder} is not a quantized checkpoint: its config has no quantization_config.")
    method = section.get("quant_method", "gptq")
    if method == COMPRESSED_TENSORS:
        return CompressedTensorsFormat.parse(folder, section)
    if method != "gptq":
        raise QuasarError(
            f"{folder} is quantized by {method}, which this version does not read; "
            f"it reads gptq and {COMPRESSED_TENSORS}."
        )
    return QuantizationFormat.parse(folder, section)


class VerifierCheckpoint:
    """A quantized checkpoint's folder: config, format, packed layers, the tensors that stayed as they were."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise QuasarError(f"The verifier's folder {folder} does not exist.")
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self.format = parse_format(folder, self.config)
        self.tensors = TensorFiles(folder)
        card = folder / "quasar.json"
        self.card: dict[str, Any] = read_json(card) if card.exists() else {}
        version = self.card.get("format_version", CARD_VERSION)
        if version != CARD_VERSION:
            raise QuasarError(f"{card} has format version {version}, which this version of quasar does not read.")

    @property
    def layer_names(self) -> list[str]:
        """Modules whose weight is packed, such as `model.layers.0.mlp.up_proj`."""
        marker = f".{self.format.marker}"
        return [name.removesuffix(marker) for name in self.tensors.names() if name.endswith(marker)]

    @property
    def plain_names(self) -> list[str]:
        """Tensors that are not part of a packed weight: norms, biases, the embedding."""
        packed = {f"{layer}.{suffix}" for layer in self.layer_names for suffix in self.format.suffixes}
        return [name for name in self.tensors.names() if name not in packed]

    @property
    def own_norms(self) -> bool:
        """Whether norms may differ from the target's: smoothing puts its factors into them."""
        return isinstance(self.format, CompressedTensorsFormat)

    @property
    def fidelity(self) -> FidelityReport | None:
        """The report that quantizing wrote; None in a checkpoint of another tool."""
        report = self.card.get("report")
        if not report:
            return None
        try:
            return FidelityReport.from_dict(report["fidelity"])
        except (KeyError, TypeError) as error:
            raise QuasarError(f"{self.folder / 'quasar.json'} holds no fidelity report ({error}).") from error

    @property
    def target_fingerprint(self) -> str | None:
        """The fingerprint of the target it was made from; None in a checkpoint of another tool."""
        target = self.card.get("target")
        return target["fingerprint"] if target else None

    def layer(self, name: str, device: torch.device = CPU) -> PackedWeight:
        """One layer's weight, unpacked and checked; GPTQ's codes on the device, since billions take a GPU no time."""
        place = device if isinstance(self.format, QuantizationFormat) else CPU
        parts = {s: f"{name}.{s}" for s in self.format.suffixes if f"{name}.{s}" in self.tensors}
        return self.format.unpack(name, {s: self.tensors.load(full).to(place) for s, full in parts.items()})
