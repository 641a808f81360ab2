"""8 bits for weights and activations: integers (W8A8) or floating point (fp8 e4m3).

Weights have one scale per output, activations one step per token, found when the model runs. Scales have bfloat16's
digits, so that a checkpoint of any dtype holds them exactly. Letters: T rows, in and out the layer's sizes.
"""

from abc import ABC, abstractmethod

import torch

from quasar_core.checkpoint.compressed_tensors import PackedWeight
from quasar_core.checkpoint.float8 import FLOAT8, LARGEST, Float8Weight
from quasar_core.checkpoint.packing import QuantizedWeight, trivial_groups
from quasar_core.kernels.float8 import quantize_rows_float8
from quasar_core.kernels.int8 import LARGEST as LARGEST_INTEGER
from quasar_core.kernels.int8 import quantize_rows

SMALLEST_SCALE = 2.0**-17  # float16 holds bfloat16's digits down to here
_MIDDLE = 128  # the code of 0


class Number(ABC):
    """A way to write numbers in 8 bits. A weight is what it can write, times the scale of its output."""

    largest: float
    dtype: torch.dtype  # that holds all it can write

    @abstractmethod
    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """The nearest of what it can write, in the dtype of the values."""

    @abstractmethod
    def pack(self, values: torch.Tensor, scales: torch.Tensor) -> PackedWeight:
        """A layer of values [out, in] that it can write and scales [out], on the CPU."""

    @abstractmethod
    def round_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Activations [T, in] → what is left of them, float32 [T, in]."""

    def round_weight(self, weight: torch.Tensor) -> PackedWeight:
        """Every weight [out, in] to the nearest, on its own."""
        scales = channel_scales(weight, self.largest)
        return self.pack(self.nearest(weight.float() / scales[:, None]), scales)


class Integers(Number):
    """From −127 to 127."""

    largest = float(LARGEST_INTEGER)
    dtype = torch.int8

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """Whole numbers, ties to even."""
        return values.round().clamp_(-self.largest, self.largest)

    def pack(self, values: torch.Tensor, scales: torch.Tensor) -> QuantizedWeight:
        """Codes around 128."""
        return QuantizedWeight(
            bits=8,
            group_size=-1,
            codes=(values.to("cpu", torch.int16) + _MIDDLE).t().to(torch.uint8).contiguous(),
            scales=scales[None].to("cpu", torch.float16),
            zeros=torch.full((1, len(values)), _MIDDLE, dtype=torch.int32),
            g_idx=trivial_groups(values.shape[1], -1),
        )

    def round_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Rounded, and back."""
        values, steps = quantize_rows(x)
        return values.float() * steps


class Floats(Number):
    """e4m3: up to 448, 3 bits of mantissa."""

    largest = LARGEST
    dtype = FLOAT8

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """As the dtype rounds."""
        return values.clamp(-LARGEST, LARGEST).to(FLOAT8).to(values.dtype)

    def pack(self, values: torch.Tensor, scales: torch.Tensor) -> Float8Weight:
        """Values and scales as they are."""
        return Float8Weight(values.to("cpu", FLOAT8), scales.cpu())

    def round_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Rounded, and back."""
        values, steps = quantize_rows_float8(x)
        return values.float() * steps


def channel_scales(weight: torch.Tensor, largest: float) -> torch.Tensor:
    """Scales [out] in float32 with bfloat16's digits: the largest magnitude of an output ÷ the largest number."""
    scales = weight.float().abs().amax(dim=1) / largest
    return scales.clamp_min(SMALLEST_SCALE).to(torch.bfloat16).float()
