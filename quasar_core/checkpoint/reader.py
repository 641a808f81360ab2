"""Read a verifier checkpoint, strictly: what does not fit the format is refused in one sentence."""

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from quasar_core.checkpoint import float8_blocks, stacked_experts
from quasar_core.checkpoint.compressed_tensors import METHOD as COMPRESSED_TENSORS
from quasar_core.checkpoint.compressed_tensors import CompressedTensorsFormat, PackedWeight
from quasar_core.checkpoint.gptq_format import (
    PackedLayout,
    QuantizedWeight,
    check_part,
    infer_layout,
    offset_of_symmetric,
    unpack_columns,
    unpack_weight,
)
from quasar_core.config import BITS
from quasar_core.errors import QuasarError, foreign_errors
from quasar_core.files import is_file, is_folder, read_json, read_json_if_there, require_regular
from quasar_core.malloc import return_freed_memory
from quasar_core.page_cache import forget_file
from quasar_core.records import FidelityReport
from quasar_core.store.model_config import read_config, read_text_config, read_text_headers, text_entries
from quasar_core.store.safetensors_header import (
    INDEX_NAME,
    WEIGHTS_NAME,
    TensorEntry,
    read_headers,
    read_index,
    weight_files,
)
from quasar_core.store.text_part import prefixes_of, text_name
from quasar_core.typed import build, known_part

CPU = torch.device("cpu")
CARD_VERSION = 1  # of quasar.json
GPTQ_METHODS = ("gptq", "gptq_v2", "auto-round", "intel/auto-round")  # whose tensors have GPTQ's names
_EIGHT_BITS = ("I8", "F8_E4M3")  # as safetensors names what a weight that was never quantized is not stored in
PACKED_SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


class TensorFiles:
    """The safetensors files of a folder as one mapping from name to tensor, read on demand.

    Of a multimodal model they are those of its text part, by the names of a text model (`store/text_part.py`); the
    names in the files are known too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sparing = False  # whether what was read is to leave memory at once
        files = weight_files(folder)
        if not files:
            raise QuasarError(f"{folder} holds no safetensors files.")
        for path in files:
            with open_tensors(path):
                pass  # the library's own checks of a header are stricter than ours
        text = text_entries(folder)
        self._stored = {name: entry.name for name, entry in text.items()}
        renamed = any(name != stored for name, stored in self._stored.items())
        self._prefixes = prefixes_of(self._stored.values()) if renamed else {}
        self._entries = {name: replace(entry, name=name) for name, entry in text.items()}
        self._where = {name: entry.file for name, entry in self._entries.items()}
        held = {entry.name: entry for entry in read_headers(folder)}
        beside = {name: held[name] for name in sorted(held.keys() - self._stored.values())}
        self._where |= {name: entry.file for name, entry in beside.items()}
        self._stored |= {name: name for name in beside}
        self._scales = self._take_scales(self._entries)
        self.dequantized = len(self._scales)  # weights that are stored in 8-bit floats and come as bfloat16
        self._scales |= self._take_scales(beside)
        self.beside = list(beside)  # what is not of the text, by its stored names
        self._entries, self._parts = stacked_experts.separate(self._entries)
        self._where |= {name: entry.file for name, entry in self._entries.items()}
        if files != [folder / WEIGHTS_NAME]:
            self._check_index(held.keys())

    def _take_scales(self, entries: dict[str, TensorEntry]) -> dict[str, Path]:
        """Where the scales of weights in 8-bit blocks lie, by the weight; they are no tensors of the model, and go."""
        coded = [name for name, entry in entries.items() if entry.dtype == float8_blocks.STORED]
        found = {name: self._where[scale] for name in coded if (scale := float8_blocks.scale_of(name)) in self._where}
        for name in found:
            module = name.removesuffix("weight")
            for extra in (float8_blocks.scale_of(name), *(f"{module}{end}" for end in float8_blocks.UNUSED)):
                entries.pop(extra, None)
        if found:
            self._block = float8_blocks.block_size(read_config(self.folder))
        return found

    def dequantizes(self, name: str) -> bool:
        """Whether a weight is one of those."""
        return self.own(name) in self._scales

    def _check_index(self, held: Set[str]) -> None:
        """A tensor that the index names and no file holds is lost; a verifier would be without it, unnoticed."""
        index = self.folder / INDEX_NAME
        named = read_index(self.folder) if is_file(index) else {}
        lost = sorted(named.keys() - held)
        if lost:
            raise QuasarError(f"{index} names the tensor {lost[0]}, and {named[lost[0]]} does not hold it.")

    def stored(self, name: str) -> str:
        """The name in the files of a tensor, or of a layer, that a text model has by this one."""
        prefix = next((own for own in self._prefixes if name.startswith(own) or f"{name}." == own), None)
        if name in self._stored or prefix is None:
            return self._stored.get(name, name)
        return (self._prefixes[prefix] + f"{name}.".removeprefix(prefix)).removesuffix(".")

    def own(self, stored: str) -> str:
        """The name that a text model has for a tensor of the files."""
        return (text_name(stored) if self._prefixes else None) or stored

    def __contains__(self, name: str) -> bool:
        return self.own(name) in self._entries

    def holds_whole(self, name: str) -> bool:
        """Whether a tensor is stored by itself, and not as a part of one with all experts."""
        return self.own(name) in self._entries and self.own(name) not in self._parts

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from its file's header."""
        return self.entry(name).shape

    def entry(self, name: str) -> TensorEntry:
        """Where a tensor's bytes lie."""
        if name not in self:
            raise QuasarError(f"{self.folder} holds no tensor {name}.")
        return self._entries[self.own(name)]

    def scales_of(self, name: str) -> tuple[torch.Tensor, tuple[int, int]] | None:
        """The scales of a weight in 8-bit floats, and the size of their blocks; None for other tensors."""
        if name not in self._scales:
            return None
        with open_tensors(self._scales[name]) as file:
            scales = self.stored(float8_blocks.scale_of(name))
            return read_tensor(file, scales, self._scales[name]), self._block

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """QuasarError where the stored tensor has another shape than the model's config gives it."""
        stored = self.shape(name)
        if stored != shape:
            raise QuasarError(f"The tensor {name} in {self.folder} is {stored}, and by its config {shape}.")

    def load(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        if self.own(name) not in self._where:
            raise QuasarError(f"{self.folder} holds no tensor {name}.")
        with open_tensors(self._where[self.own(name)]) as file:
            return self._read(file, self.own(name))

    def _read(self, file: Any, name: str) -> torch.Tensor:
        """One tensor of an open file, dequantized where it is stored in 8-bit blocks."""
        if name in self._parts:
            part = self._parts[name]
            with foreign_errors(f"The tensor {part.name} in {self._where[name]} cannot be read"):
                return part.read(file, self.stored(part.name))
        tensor = read_tensor(file, self.stored(name), self._where[name])
        scales = self.scales_of(name)
        return tensor if scales is None else float8_blocks.dequantize(name, tensor, *scales)

    def let_go(self, names: Iterable[str]) -> None:
        """Where memory is short: let the system have what reading tensors took that nobody holds any more.

        Raises OSError.
        """
        if not self.sparing:
            return
        for entry in [self._entries[name] for name in names]:
            forget_file(entry.file, entry.start, entry.size)
        return_freed_memory()

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same values."""
        return self.shape(one) == self.shape(other) and torch.equal(self.load(one), self.load(other))

    def load_many(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors file by file, each file opened once."""
        where = {name: self._where[self.own(name)] for name in names}
        for path in sorted(set(where.values())):
            with open_tensors(path) as file:
                for name in names:
                    if where[name] == path:
                        yield name, self._read(file, self.own(name))


def open_tensors(path: Path) -> Any:
    """A safetensors file, memory-mapped on the CPU."""
    require_regular(path)
    with foreign_errors(f"{path} is not a readable safetensors file"):
        return safe_open(path, framework="pt", device="cpu")


def read_tensor(file: Any, name: str, path: Path) -> torch.Tensor:
    """One tensor of an open file; `path` is where it lies, for the sentence of a failure."""
    with foreign_errors(f"The tensor {name} in {path} cannot be read"):
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


@dataclass(frozen=True)
class _Target:
    """The model that a verifier was made from."""

    name: str
    fingerprint: str


@dataclass(frozen=True)
class _Report:
    """What is read of quantizing's report."""

    fidelity: FidelityReport
    layer_errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Card:
    """What is read of quasar.json; all of it may be missing in one that was written by hand."""

    format_version: int = CARD_VERSION
    target: _Target | None = None
    calibration: dict[str, Any] | None = None
    versions: dict[str, Any] | None = None
    report: _Report | None = None


def _read_card(path: Path) -> tuple[dict[str, Any], _Card]:
    """The content of quasar.json, and what is read of it; empty where there is none."""
    content = read_json_if_there(path) or {}
    version = content.get("format_version", CARD_VERSION)
    if version != CARD_VERSION:
        raise QuasarError(f"{path} has format version {version}, which this version of quasar does not read.")
    parts = {**content}
    for name, kind in (("target", _Target), ("report", _Report)):
        parts[name] = known_part(kind, content.get(name) or None)
    try:
        return content, build(_Card, known_part(_Card, parts))
    except ValueError as error:
        raise QuasarError(f"{path} is damaged: {error}.") from error


@dataclass(frozen=True)
class QuantizationFormat:
    """GPTQ's format: the part of `quantization_config` that reading depends on."""

    bits: int
    group_size: int
    zeros_offset: int
    symmetric: bool = False  # so the zeros tell their version themselves

    marker = "qweight"  # every quantized layer has one
    suffixes = PACKED_SUFFIXES
    only_packed = PACKED_SUFFIXES  # that no other tensor's name ends in

    @classmethod
    def parse(cls, folder: Path, section: Mapping[str, Any]) -> "QuantizationFormat":
        """From `quantization_config`; QuasarError for what this version does not read.

        What a section leaves out is as AutoGPTQ has it: 4 bits, one group per output, version 1. GPTQModel takes groups
        of 128; the shapes of a layer's tensors have the last word on both.
        """
        bits, group_size = section.get("bits", 4), section.get("group_size")
        if type(bits) is not int or bits not in BITS:
            raise QuasarError(f"{folder} has {bits!r}-bit codes, which this version does not read.")
        group_size = -1 if group_size is None else group_size
        if type(group_size) is not int or (group_size != -1 and group_size < 1):
            raise QuasarError(f"{folder} has groups of {group_size}, which this version does not read.")
        packed = section.get("pack_dtype") or "int32"
        if packed != "int32":
            raise QuasarError(f"{folder} packs codes into {packed}, which this version does not read.")
        version = named_version(folder, section)
        if version not in ("gptq", "gptq_v2"):
            raise QuasarError(f"{folder} has the checkpoint format {version}, which this version does not read.")
        return cls(bits, group_size, 1 if version == "gptq" else 0, bool(section.get("sym", True)))

    def layout(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> PackedLayout:
        """A layer's sizes, from the shapes of its tensors."""
        return infer_layout(name, shapes, self.bits, self.group_size)

    def unpack(self, name: str, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """Read a layer's tensors strictly."""
        return unpack_weight(name, tensors, self.bits, self.group_size, self.zeros_offset, self.symmetric)

    def check_parts(self, name: str, parts: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
        """QuasarError where a layer's tensors, by shape and dtype, could not be unpacked."""
        layout = self.layout(name, {part: shape for part, (shape, _) in parts.items()})
        for part, (shape, dtype) in parts.items():
            check_part(name, part, shape, dtype, layout)

    def describe_zeros(self, stored: torch.Tensor, bits: int) -> str:
        """Which version the stored zeros [G, out·bits/32] of a layer are read as, and why."""
        offset, why = self.zeros_offset, "as its config names it"
        if self.symmetric:
            offset = offset_of_symmetric(unpack_columns(stored, bits), bits, self.zeros_offset)
            if offset != self.zeros_offset:
                why = f"as all are {2 ** (bits - 1) - offset}, though its config names version {2 - self.zeros_offset}"
        return f"version {2 - offset}, {why}"


def named_version(folder: Path, section: Mapping[str, Any]) -> str:
    """The layout's name as writers have it: `checkpoint_format` (AutoGPTQ), `format` (GPTQModel), `packing_format`
    (AutoRound), or AutoGPTQ's older flag; `gptq`, which is version 1, where none is given.
    """
    if section.get("is_marlin_format"):
        return "marlin"
    packing = str(section.get("packing_format") or "").removeprefix("auto_round:")
    names = [section.get("checkpoint_format"), section.get("format"), {"auto_gptq": "gptq"}.get(packing, packing)]
    given = [str(name) for name in names if name]
    if len(set(given)) > 1:
        raise QuasarError(f"The quantization_config of {folder} names two formats: {' and '.join(given)}.")
    return given[0] if given else "gptq"


def parse_format(folder: Path, config: dict[str, Any]) -> QuantizationFormat | CompressedTensorsFormat:
    """The format by config.json's `quantization_config`, or by quantize_config.json beside it."""
    section = config.get("quantization_config")
    if section is None and is_file(folder / "quantize_config.json"):
        section = read_json(folder / "quantize_config.json")
    if section is None:
        raise QuasarError(f"{folder} is not a quantized checkpoint: its config has no quantization_config.")
    if not isinstance(section, dict):
        raise QuasarError(f"The quantization_config of {folder} is not a JSON object.")
    method = section.get("quant_method") or "gptq"
    if method == COMPRESSED_TENSORS:
        return CompressedTensorsFormat.parse(folder, section)
    if method not in GPTQ_METHODS:
        raise QuasarError(
            f"{folder} is quantized by {method}, which this version does not read; "
            f"it reads gptq and {COMPRESSED_TENSORS}."
        )
    return QuantizationFormat.parse(folder, section)


class VerifierCheckpoint:
    """A quantized checkpoint's folder: config, format, packed layers, the tensors that stayed as they were."""

    def __init__(self, folder: Path) -> None:
        if not is_folder(folder):
            raise QuasarError(f"The verifier's folder {folder} does not exist.")
        self.folder = folder
        self.config = read_text_config(folder)
        self.format = parse_format(folder, self.config)
        self.tensors = TensorFiles(folder)
        self._refuse_parts()
        self.card, self._card = _read_card(folder / "quasar.json")

    def _refuse_parts(self) -> None:
        """A layer of which the marker alone is missing would be taken for one that was never quantized."""
        layers = set(self.layer_names)
        for entry in read_text_headers(self.folder):
            layer, _, suffix = entry.name.rpartition(".")
            belongs = suffix in self.format.only_packed or (suffix == "weight" and entry.dtype in _EIGHT_BITS)
            if belongs and layer not in layers:
                raise QuasarError(f"The checkpoint's layer {layer} has no {self.format.marker}.")

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

    def describe_zeros(self) -> str | None:
        """How GPTQ's zeros are read, told by the first quantized layer; None in another format, or without layers."""
        if not isinstance(self.format, QuantizationFormat) or not self.layer_names:
            return None
        name = self.layer_names[0]
        shapes = {
            part: self.tensors.shape(f"{name}.{part}") for part in PACKED_SUFFIXES if f"{name}.{part}" in self.tensors
        }
        return self.format.describe_zeros(self.tensors.load(f"{name}.qzeros"), self.format.layout(name, shapes).bits)

    @property
    def own_norms(self) -> bool:
        """Whether norms may differ from the target's: smoothing puts its factors into them."""
        return isinstance(self.format, CompressedTensorsFormat)

    @property
    def fidelity(self) -> FidelityReport | None:
        """The report that quantizing wrote; None in a checkpoint of another tool."""
        return self._card.report.fidelity if self._card.report else None

    @property
    def target_fingerprint(self) -> str | None:
        """The fingerprint of the target it was made from; None in a checkpoint of another tool."""
        return self._card.target.fingerprint if self._card.target else None

    def layer(self, name: str, device: torch.device = CPU) -> PackedWeight:
        """One layer's weight, unpacked and checked; GPTQ's codes on the device, since billions take a GPU no time."""
        place = device if isinstance(self.format, QuantizationFormat) else CPU
        parts = {s: f"{name}.{s}" for s in self.format.suffixes if f"{name}.{s}" in self.tensors}
        weight = self.format.unpack(name, {s: self.tensors.load(full).to(place) for s, full in parts.items()})
        self.tensors.let_go(parts.values())
        return weight
