"""The dense path: dequantized once, at load, then a plain product: no memory is saved, many rows are fast."""

import torch

from quasar_core import system
from quasar_core.checkpoint.packing import QuantizedWeight
from quasar_core.kernels.base import LayerShape

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
    """Why layers of a shape should not be unpacked where they need not be: they would fill the device's memory."""
    needed, free = LAYERS * shape.in_features * shape.out_features * dtype.itemsize, free_memory(device)
    if free is None or needed <= free:
        return None
    return f"{LAYERS} such layers unpacked would take {needed / 1e9:.1f} GB of the {free / 1e9:.1f} GB that are free"


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had; None where the system does not tell."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else system.free_memory()
