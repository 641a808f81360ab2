"""Read AutoAWQ's format (GEMM version): 4-bit codes with a zero for each group, as many publishers offer.

A layer of `in` inputs and `out` outputs, group size g, G = in / g, holds `qweight` [in, out/8], `qzeros` [G, out/8]
(both int32, eight columns a word) and `scales` [G, out]: W[i, o] = scales[i/g, o] · (code − zero). The eight columns of
a word do not lie in order. AWQ (arXiv 2306.00978) multiplies the inputs' weights of a layer by factors and divides what
comes before by them, so that a checkpoint has norms of its own.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quasar_core.checkpoint.gptq_format import (
    SCALE_DTYPES,
    PackedLayout,
    QuantizedWeight,
    trivial_groups,
    unpack_columns,
)
from quasar_core.errors import QuasarError

METHOD = "awq"
COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # which of a word's eight columns each four bits are, from the lowest on
BITS = 4


@dataclass(frozen=True)
class AwqFormat:
    """What reading depends on; a group size of −1 is one group for a whole row."""

    group_size: int

    bits = BITS
    marker = "qweight"  # every quantized layer has one
    suffixes = ("qweight", "qzeros", "scales")
    only_packed = suffixes  # that no other tensor's name ends in

    @classmethod
    def parse(cls, folder: Path, section: Mapping[str, Any]) -> "AwqFormat":
        """From `quantization_config`; QuasarError for what this version does not read."""
        version = str(section.get("version") or section.get("format") or "gemm").lower()
        if version != "gemm":
            raise QuasarError(f"{folder} is quantized by AWQ in the layout {version}; this version reads gemm.")
        bits = section.get("bits", section.get("w_bit", BITS))
        if bits != BITS:
            raise QuasarError(f"{folder} has {bits!r}-bit codes of AWQ, which this version does not read.")
        size = section.get("group_size", section.get("q_group_size", 128))
        if type(size) is not int or (size != -1 and size < 1):
            raise QuasarError(f"{folder} has groups of {size}, which this version does not read.")
        return cls(size)

    def layout(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> PackedLayout:
        """A layer's sizes, from the shapes of its tensors; QuasarError where they contradict each other."""
        missing = [part for part in self.suffixes if part not in shapes]
        if missing:
            raise QuasarError(f"The checkpoint's layer {name} has no {', '.join(missing)}.")
        stored = shapes["qweight"]
        if len(stored) != 2 or 0 in stored:
            raise QuasarError(f"The checkpoint's layer {name} has qweight of shape {stored}, which holds no matrix.")
        inputs, words = stored
        size = inputs if self.group_size == -1 else self.group_size
        if inputs % size:
            raise QuasarError(f"The checkpoint's layer {name} has {inputs} inputs, no multiple of the group of {size}.")
        for part, shape in {"qzeros": (inputs // size, words), "scales": (inputs // size, words * 8)}.items():
            if shapes[part] != shape:
                raise QuasarError(f"The checkpoint's layer {name} has {part} of shape {shapes[part]}, not {shape}.")
        return PackedLayout(inputs, words * 8, BITS, self.group_size)

    def check_parts(self, name: str, parts: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
        """QuasarError where a layer's tensors, by shape and dtype, could not be unpacked."""
        self.layout(name, {part: shape for part, (shape, _) in parts.items()})
        floats = tuple(str(kind).removeprefix("torch.") for kind in SCALE_DTYPES)
        for part, (_, dtype) in parts.items():
            if dtype not in (floats if part == "scales" else ("int32",)):
                raise QuasarError(
                    f"The checkpoint's layer {name} has {part} in {dtype}, which this version does not read."
                )

    def unpack(self, name: str, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """Read a layer's tensors strictly."""
        parts = {part: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for part, t in tensors.items()}
        self.check_parts(name, parts)
        scales = tensors["scales"].to(torch.float16)
        if not bool(torch.isfinite(scales).all()):
            raise QuasarError(f"The checkpoint's layer {name} has scales that are not finite.")
        return QuantizedWeight(
            BITS,
            self.group_size,
            codes=_in_order(tensors["qweight"]),
            scales=scales.contiguous(),
            zeros=_in_order(tensors["qzeros"]).to(torch.int32),
            g_idx=trivial_groups(len(tensors["qweight"]), self.group_size),
        )


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """Codes [n, m] uint8 of words [n, m/8], columns in order."""
    codes = unpack_columns(words, BITS)
    place = [COLUMNS.index(column) for column in range(len(COLUMNS))]
    return codes.view(len(codes), -1, len(COLUMNS))[:, :, place].reshape(len(codes), math.prod(codes.shape[1:]))
