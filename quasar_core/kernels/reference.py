"""The reference path: unpack, dequantize, multiply. Slow, plain, and right for every shape; the others' oracle."""

from dataclasses import dataclass

import torch

from quasar_core.checkpoint.packing import QuantizedWeight, pack_rows, unpack_rows
from quasar_core.kernels.base import LayerShape


@dataclass(frozen=True)
class PackedTensors:
    """A layer on the device: packed codes; scales and zeros as they are, so that a zero of any value has room."""

    qweight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor
    bits: int
    group_size: int


class ReferenceKernel:
    """Dequantizes the whole weight for every product."""

    name = "reference"

    def why_not(self, shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
        """Supports everything."""
        return None

    def prepare(self, weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> PackedTensors:
        """The codes packed, everything moved to the device."""
        return PackedTensors(
            pack_rows(weight.codes, weight.bits).to(device),
            weight.scales.to(device),
            weight.zeros.to(device),
            weight.g_idx.to(device),
            weight.bits,
            weight.group_size,
        )

    def multiply(self, x: torch.Tensor, prepared: PackedTensors) -> torch.Tensor:
        """Unpack, dequantize, multiply."""
        codes = unpack_rows(prepared.qweight, prepared.bits)
        weight = QuantizedWeight(
            prepared.bits, prepared.group_size, codes, prepared.scales, prepared.zeros, prepared.g_idx
        )
        return torch.nn.functional.linear(x, weight.dequantize(x.dtype))
