"""Weights in 8-bit floating point (e4m3: 4 bits of exponent, 3 of mantissa), one scale per output.

The format of Micikevicius et al., 2022 (arXiv 2209.05433). Letters: in and out are the layer's sizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

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
