"""8 bits for weights and activations: integers (W8A8) or floating point (fp8 e4m3), rounded to nearest.

Weights have one scale per output, activations one step per token, found when the model runs. Scales have bfloat16's
digits, so that a checkpoint of any dtype holds them exactly. Letters: T rows, in and out the layer's sizes.
"""

from typing import Protocol

import torch

from quasar_core.checkpoint.compressed_tensors import PackedWeight
from quasar_core.checkpoint.float8 import FLOAT8, LARGEST, Float8Weight
from quasar_core.checkpoint.packing import QuantizedWeight, trivial_groups
from quasar_core.kernels.float8 import quantize_rows_float8
from quasar_core.kernels.int8 import LARGEST as LARGEST_INTEGER
from quasar_core.kernels.int8 import quantize_rows

SMALLEST_SCALE = 2.0**-17  # float16 holds bfloat16's digits down to here
_MIDDLE = 128  # the code of 0


class Number(Protocol):
    """A way to write numbers in 8 bits."""

    def round_weight(self, weight: torch.Tensor) -> PackedWeight:
        """Weight [out, in] on its grid, on the CPU."""
        ...

    def round_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Activations [T, in] → what is left of them, float32 [T, in]."""
        ...


class Integers:
    """From −127 to 127."""

    def round_weight(self, weight: torch.Tensor) -> QuantizedWeight:
        """Codes around 128."""
        scales = channel_scales(weight, LARGEST_INTEGER)
        codes = torch.round(weight.float() / scales[:, None]).clamp(-LARGEST_INTEGER, LARGEST_INTEGER) + _MIDDLE
        return QuantizedWeight(
            bits=8,
            group_size=-1,
            codes=codes.t().to("cpu", torch.uint8).contiguous(),
            scales=scales[None].to("cpu", torch.float16),
            zeros=torch.full((1, weight.shape[0]), _MIDDLE, dtype=torch.int32),
            g_idx=trivial_groups(weight.shape[1], -1),
        )

    def round_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Rounded, and back."""
        values, steps = quantize_rows(x)
        return values.float() * steps


class Floats:
    """e4m3: up to 448, 3 bits of mantissa."""

    def round_weight(self, weight: torch.Tensor) -> Float8Weight:
        """Values and scales."""
        scales = channel_scales(weight, LARGEST)
        values = (weight.float() / scales[:, None]).clamp(-LARGEST, LARGEST).to(FLOAT8)
        return Float8Weight(values.cpu(), scales.cpu())

    def round_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Rounded, and back."""
        values, steps = quantize_rows_float8(x)
        return values.float() * steps


def channel_scales(weight: torch.Tensor, largest: float) -> torch.Tensor:
    """Scales [out] in float32 with bfloat16's digits: the largest magnitude of an output ÷ the largest number."""
    scales = weight.float().abs().amax(dim=1) / largest
    return scales.clamp_min(SMALLEST_SCALE).to(torch.bfloat16).float()
