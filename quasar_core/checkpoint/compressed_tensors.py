"""The compressed-tensors format, as vLLM, SGLang and transformers read it: 8 bits for weights and activations.

A layer of `in` inputs and `out` outputs holds `weight` [out, in] (int8, or float8 e4m3) and `weight_scale` [out, 1],
with W = weight · weight_scale; activations are rounded per token when the model runs, and nothing is stored for them.
Written: `int-quantized` and `float-quantized`, one scale per output. Read besides: one scale per tensor or per group,
zero points, and `pack-quantized` integers (codes of 2 to 8 bits along the inputs, as one little-endian bit stream).
Activations are rounded by the kernel that runs here, whatever the section says of them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from quasar_core.checkpoint.float8 import FLOAT8, Float8Weight
from quasar_core.checkpoint.packing import (
    QuantizedWeight,
    codes_per_period,
    trivial_groups,
    unpack_columns,
    unpack_rows,
)
from quasar_core.config import BITS
from quasar_core.errors import QuasarError

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

    @classmethod
    def parse(cls, folder: Path, section: Mapping[str, Any]) -> "CompressedTensorsFormat":
        """From `quantization_config`; QuasarError for what this version does not read."""

        def require(holds: bool, what: str) -> None:
            if not holds:
                raise QuasarError(f"{folder} has {what}, which this version does not read.")

        require(section.get("format") in FORMATS, f"the compressed-tensors format {section.get('format')}")
        schemes = [group.get("weights") or {} for group in (section.get("config_groups") or {}).values()]
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

    def unpack(self, name: str, tensors: Mapping[str, torch.Tensor]) -> PackedWeight:
        """Read a layer's tensors strictly."""
        for sentence in self._obstacles(tensors):
            raise QuasarError(f"The checkpoint's layer {name} {sentence}.")
        if "weight_packed" not in tensors and tensors["weight"].dtype == FLOAT8:
            weight = tensors["weight"]
            return Float8Weight(weight, _scales(tensors, weight.shape[0])[:, 0].contiguous())
        values, zeros = self._integers(tensors)  # [out, in], [out, G]
        out_features, in_features = values.shape
        scales = _scales(tensors, out_features)
        groups = tensors.get("weight_g_idx", trivial_groups(in_features, self.group_size))
        return QuantizedWeight(
            self.bits,
            self.group_size,
            codes=values.t().contiguous(),
            scales=scales.t().to(torch.float16).contiguous(),
            zeros=zeros.expand(scales.shape).t().contiguous(),
            g_idx=groups.to(torch.int32),
        )

    def _integers(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [out, in] uint8 and zeros [out, G] or [1, 1] int32, both counted from the lowest code."""
        middle = 2 ** (self.bits - 1)
        zeros = tensors.get("weight_zero_point", torch.zeros(1, 1, dtype=torch.int8))
        if "weight_packed" not in tensors:
            return (tensors["weight"].to(torch.int16) + middle).to(torch.uint8), zeros.to(torch.int32) + middle
        codes = unpack_columns(tensors["weight_packed"], self.bits)
        if "weight_zero_point" not in tensors:
            return codes, zeros.to(torch.int32) + middle
        return codes, unpack_rows(zeros, self.bits).to(torch.int32)

    def _obstacles(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
        """What does not fit, as the end of a sentence that the layer's name begins."""
        stored = tensors.get("weight_packed", tensors.get("weight"))
        if stored is None:
            yield "has no weight"
            return
        packed, kinds = "weight_packed" in tensors, (torch.int8, FLOAT8)
        if stored.dim() != 2 or stored.dtype not in ((torch.int32,) if packed else kinds):
            yield f"has a weight of shape {tuple(stored.shape)} in {str(stored.dtype).removeprefix('torch.')}"
            return
        if packed and stored.shape[1] % (codes_per_period(self.bits) * self.bits // 32):
            yield f"has weight_packed of shape {tuple(stored.shape)}, which {self.bits}-bit codes cannot fill"
            return
        in_features = stored.shape[1] * 32 // self.bits if packed else stored.shape[1]
        if packed and tensors.get("weight_shape", torch.tensor([0, in_features]))[-1] != in_features:
            yield "has inputs that do not fill whole words, which this version does not read"
        groups = 1 if self.group_size == -1 else -(-in_features // self.group_size)
        scale = tensors["weight_scale"]
        if scale.numel() not in (1, stored.shape[0] * groups):
            yield f"has weight_scale of shape {tuple(scale.shape)}, not {(stored.shape[0], groups)}"
        if not bool(torch.isfinite(scale.float()).all()):
            yield "has scales that are not finite"


def _scales(tensors: Mapping[str, torch.Tensor], out_features: int) -> torch.Tensor:
    """Scales [out, G] in float32; a single one holds for the whole layer."""
    scale = tensors["weight_scale"].float()
    return scale.reshape(1, 1).expand(out_features, 1) if scale.numel() == 1 else scale.reshape(out_features, -1)
