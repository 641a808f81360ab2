"""How a checkpoint's codes are stored, by its `quantization_config`: GPTQ's format, AWQ's, or compressed-tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quasar_core.checkpoint.awq_format import METHOD as AWQ
from quasar_core.checkpoint.awq_format import AwqFormat
from quasar_core.checkpoint.compressed_tensors import METHOD as COMPRESSED_TENSORS
from quasar_core.checkpoint.compressed_tensors import CompressedTensorsFormat
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
from quasar_core.errors import QuasarError
from quasar_core.files import is_file, read_json

GPTQ_METHODS = ("gptq", "gptq_v2", "auto-round", "intel/auto-round")  # whose tensors have GPTQ's names
PACKED_SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class GptqFormat:
    """GPTQ's format: the part of `quantization_config` that reading depends on."""

    bits: int
    group_size: int
    zeros_offset: int
    symmetric: bool = False  # so the zeros tell their version themselves

    marker = "qweight"  # every quantized layer has one
    suffixes = PACKED_SUFFIXES
    only_packed = PACKED_SUFFIXES  # that no other tensor's name ends in

    @classmethod
    def parse(cls, folder: Path, section: Mapping[str, Any]) -> "GptqFormat":
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


StoredFormat = GptqFormat | AwqFormat | CompressedTensorsFormat


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


def parse_format(folder: Path, config: dict[str, Any]) -> StoredFormat:
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
    if method == AWQ:
        return AwqFormat.parse(folder, section)
    if method not in GPTQ_METHODS:
        raise QuasarError(
            f"{folder} is quantized by {method}, which this version does not read; "
            f"it reads gptq, {AWQ} and {COMPRESSED_TENSORS}."
        )
    return GptqFormat.parse(folder, section)
