"""Read and write the compressed-tensors format of vLLM, SGLang and transformers: 8-bit weights and activations.

A layer of `in` inputs and `out` outputs holds `weight` [out, in] (int8, or float8 e4m3, the format of arXiv
2209.05433) and `weight_scale` [out, 1], with W = weight · weight_scale. Activations are rounded per token when the
model runs, and nothing is stored for them. Written: `int-quantized` and `float-quantized`, one scale per output. Read
besides: one scale per tensor or per group, zero points, and `pack-quantized` integers (codes of 2 to 8 bits along the
inputs, as one little-endian bit stream). The kernel that runs here rounds activations its own way, whatever the
section says.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from quasar_core.checkpoint.gptq_format import (
    SCALE_DTYPES,
    PackedLayout,
    QuantizedWeight,
    codes_per_period,
    count_groups,
    trivial_groups,
    unpack_columns,
    unpack_rows,
)
from quasar_core.config import BITS
from quasar_core.errors import QuasarError

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0  # that e4m3 holds


@dataclass(frozen=True)
class Float8Weight:
    """A linear layer: W[o, i] = scales[o] · values[o, i]."""

    values: torch.Tensor  # [out, in] float8
    scales: torch.Tensor  # [out] float32

    bits = 8
    group_size = -1

    @property
    def in_features(self) -> int:
        """Columns."""
        return self.values.shape[1]

    @property
    def out_features(self) -> int:
        """Rows."""
        return self.values.shape[0]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as `torch.nn.Linear` holds it, [out, in]; computed in float32, then rounded."""
        return (self.scales[:, None] * self.values.float()).to(dtype)


def concatenate_float8(weights: Sequence[Float8Weight]) -> Float8Weight:
    """Layers of one input as one layer, output after output."""
    # As bytes: not every device concatenates this dtype.
    values = torch.cat([weight.values.view(torch.uint8) for weight in weights]).view(FLOAT8)
    return Float8Weight(values, torch.cat([weight.scales for weight in weights]))


METHOD = "compressed-tensors"
FORMATS = ("int-quantized", "float-quantized", "naive-quantized", "pack-quantized")
STRATEGIES = ("channel", "tensor", "group")
SUFFIXES = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "input_scale",
    "output_scale",
)

PackedWeight = QuantizedWeight | Float8Weight


def quantization_section(number: Literal["int", "float"]) -> dict[str, Any]:
    """`quantization_config` of a checkpoint of ours: every linear layer but the head, activations per token."""
    eight_bits = {"num_bits": 8, "type": number, "symmetric": True, "group_size": None}
    return {
        "quant_method": METHOD,
        "format": f"{number}-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**eight_bits, "strategy": "channel", "dynamic": False},
                "input_activations": {**eight_bits, "strategy": "token", "dynamic": True},
                "output_activations": None,
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def stored_tensors(weight: PackedWeight) -> dict[str, torch.Tensor]:
    """What a layer of ours stores: 8 bits per weight, and one scale per output that has bfloat16's digits."""
    if isinstance(weight, Float8Weight):
        return {"weight": weight.values, "weight_scale": weight.scales[:, None].to(torch.bfloat16)}
    values = (weight.codes.to(torch.int16) - 128).to(torch.int8).t().contiguous()
    return {"weight": values, "weight_scale": weight.scales.t().to(torch.bfloat16).contiguous()}


@dataclass(frozen=True)
class CompressedTensorsFormat:
    """What reading depends on: the bits of a code and the group size (−1: one scale per output or per tensor)."""

    bits: int
    group_size: int

    marker = "weight_scale"  # every quantized layer has one
    suffixes = SUFFIXES
    only_packed = ("weight_packed", "weight_zero_point", "weight_shape", "weight_g_idx")  # that no other name ends in

    @classmethod
    def parse(cls, folder: Path, section: Mapping[str, Any]) -> "CompressedTensorsFormat":
        """From `quantization_config`; QuasarError for what this version does not read."""

        def require(holds: bool, what: str) -> None:
            if not holds:
                raise QuasarError(f"{folder} has {what}, which this version does not read.")

        require(section.get("format") in FORMATS, f"the compressed-tensors format {section.get('format')}")
        groups = section.get("config_groups") or {}
        require(isinstance(groups, dict) and all(isinstance(g, dict) for g in groups.values()), "odd config_groups")
        schemes = [group.get("weights") or {} for group in groups.values()]
        require(bool(schemes), "no config_groups")
        for scheme in schemes:
            strategy = scheme.get("strategy")
            require(strategy in STRATEGIES, f"weights in the strategy {strategy}")
            require(scheme.get("num_bits") in BITS, f"{scheme.get('num_bits')}-bit weights")
            if scheme.get("type", "int") == "float":
                require(strategy != "group" and scheme["num_bits"] == 8, "floating-point weights in groups or 4 bits")
        layouts = {(scheme["num_bits"], scheme.get("group_size") or -1) for scheme in schemes}
        require(len(layouts) == 1, "layers of several widths or group sizes in the compressed-tensors format")
        return cls(*layouts.pop())

    def layout(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> PackedLayout:
        """A layer's sizes, from the shapes of its tensors; QuasarError where they hold no matrix."""
        packed, stored = "weight_packed" in shapes, shapes.get("weight_packed", shapes.get("weight"))
        if stored is None:
            raise QuasarError(f"The checkpoint's layer {name} has no weight.")
        if len(stored) != 2 or 0 in stored:
            raise QuasarError(f"The checkpoint's layer {name} has a weight of shape {stored}.")
        out_features, columns = stored
        if packed and columns % (codes_per_period(self.bits) * self.bits // 32):
            raise QuasarError(
                f"The checkpoint's layer {name} has weight_packed of shape {stored}, which {self.bits}-bit codes "
                "cannot fill."
            )
        in_features = columns * 32 // self.bits if packed else columns
        return PackedLayout(in_features, out_features, self.bits, self.group_size)

    def unpack(self, name: str, tensors: Mapping[str, torch.Tensor]) -> PackedWeight:
        """Read a layer's tensors strictly."""
        layout = self.layout(name, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
        for sentence in self._obstacles(layout, tensors):
            raise QuasarError(f"The checkpoint's layer {name} {sentence}.")
        scales = _scales(tensors, layout.out_features)
        if "weight_packed" not in tensors and tensors["weight"].dtype == FLOAT8:
            return Float8Weight(tensors["weight"], scales[:, 0].contiguous())
        values, zeros = self._integers(layout, tensors)  # [out, in], [out, G]
        groups = tensors.get("weight_g_idx", trivial_groups(layout.in_features, self.group_size))
        return QuantizedWeight(
            self.bits,
            self.group_size,
            codes=values.t().contiguous(),
            scales=scales.t().to(torch.float16).contiguous(),
            zeros=zeros.expand(scales.shape).t().contiguous(),
            g_idx=groups.to(torch.int32),
        )

    def _integers(self, layout: PackedLayout, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [out, in] uint8 and zeros [out, G] or [1, 1] int32, both counted from the lowest code."""
        middle = 2 ** (self.bits - 1)
        zeros = tensors.get("weight_zero_point")
        if "weight_packed" in tensors:
            codes = unpack_columns(tensors["weight_packed"], self.bits)
            if zeros is not None:
                return codes, unpack_rows(zeros, self.bits).to(torch.int32)
        else:
            codes = (tensors["weight"].to(torch.int16) + middle).to(torch.uint8)
        if zeros is None:
            return codes, torch.full((1, 1), middle, dtype=torch.int32)
        return codes, zeros.reshape(-1 if zeros.numel() > 1 else 1, _groups(layout)).to(torch.int32) + middle

    def _obstacles(self, layout: PackedLayout, tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
        """What contradicts the layout, as the end of a sentence that begins with the layer's name."""
        packed, scale, zeros = "weight_packed" in tensors, tensors["weight_scale"], tensors.get("weight_zero_point")
        stored, outputs, groups = tensors["weight_packed" if packed else "weight"], layout.out_features, _groups(layout)
        if stored.dtype not in ((torch.int32,) if packed else (torch.int8, FLOAT8)):
            yield f"has a weight of shape {tuple(stored.shape)} in {_named(stored.dtype)}"
        if (
            stored.dtype == torch.int8
            and self.bits < 8
            and int(stored.to(torch.int16).abs().max()) > 2 ** (self.bits - 1)
        ):
            yield f"has values that {self.bits} bits do not hold"
        shape = tensors.get("weight_shape", torch.tensor([outputs, layout.in_features])).tolist()
        if packed and shape != [outputs, layout.in_features]:
            yield f"has the weight_shape {shape}, which its words hold no codes for or too many"
        if scale.dtype not in SCALE_DTYPES:
            yield f"has weight_scale in {_named(scale.dtype)}, which this version does not read"
        if scale.numel() != outputs * groups and (scale.numel() != 1 or groups != 1):
            yield f"has weight_scale of shape {tuple(scale.shape)}, not {(outputs, groups)}"
        if not bool(torch.isfinite(scale.to(torch.float16)).all()):
            yield "has scales that are not finite"
        if zeros is not None:
            yield from self._obstacles_of_zeros(packed, zeros, outputs, groups)
        rows = tensors.get("weight_g_idx", torch.zeros(layout.in_features, dtype=torch.int32))
        if (
            rows.is_floating_point()
            or rows.shape != (layout.in_features,)
            or bool(((rows < 0) | (rows >= groups)).any())
        ):
            yield f"has a weight_g_idx that does not name one of {groups} groups for each input"

    def _obstacles_of_zeros(self, packed: bool, zeros: torch.Tensor, outputs: int, groups: int) -> Iterator[str]:
        """Zero points lie as the codes do: packed along the outputs, or a byte each."""
        shape = (outputs * self.bits // 32, groups) if packed else (outputs, groups)
        alone = not packed and zeros.numel() == groups == 1
        if zeros.dtype != (torch.int32 if packed else torch.int8) or (tuple(zeros.shape) != shape and not alone):
            yield f"has weight_zero_point of shape {tuple(zeros.shape)} in {_named(zeros.dtype)}, not {shape}"


def _groups(layout: PackedLayout) -> int:
    return count_groups(layout.in_features, layout.group_size)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _scales(tensors: Mapping[str, torch.Tensor], out_features: int) -> torch.Tensor:
    """Scales [out, G] in float32; a single one holds for the whole layer."""
    scale = tensors["weight_scale"].float()
    return scale.reshape(1, 1).expand(out_features, 1) if scale.numel() == 1 else scale.reshape(out_features, -1)
