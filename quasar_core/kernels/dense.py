"""Dequantize, then multiply: once at load (`dense`), or for every product (`reference`, the other kernels' oracle).

`dense` saves no memory, and is fast with many rows; `reference` is slow, plain, and right for every shape.
"""

from dataclasses import dataclass

import torch

from quasar_core import system
from quasar_core.checkpoint.gptq_format import QuantizedWeight, pack_rows, unpack_rows
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


LAYERS = 64  # of one size, that a model may have


class DenseKernel:
    """Holds the weight as `torch.nn.Linear` does."""

    name = "dense"

    def why_not(self, shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
        """Supports everything."""
        return None

    def prepare(self, weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in] that the codes stand for."""
        return weight.dequantize(dtype).to(device).contiguous()

    def multiply(self, x: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        """One dense product."""
        return torch.nn.functional.linear(x, prepared)


def why_no_room(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why layers of a shape should not be dequantized where they need not be: they would fill the device's memory."""
    needed, free = LAYERS * shape.in_features * shape.out_features * dtype.itemsize, free_on_device(device)
    if free is None or needed <= free:
        return None
    return f"{LAYERS} such layers dequantized would take {needed / 1e9:.1f} GB of the {free / 1e9:.1f} GB that are free"


def free_on_device(device: torch.device) -> int | None:
    """Bytes that can still be had; None where the system does not tell."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else system.free_memory()
