"""The reference path: unpack, dequantize, multiply. Slow, plain, and right for every shape; the others' oracle."""

from dataclasses import dataclass

import torch

from quasar_core.checkpoint.packing import QuantizedWeight, unpack_weight
from quasar_core.kernels.base import LayerShape


@dataclass(frozen=True)
class PackedTensors:
    """The checkpoint's tensors on the device."""

    tensors: dict[str, torch.Tensor]
    bits: int
    group_size: int


class ReferenceKernel:
    """Dequantizes the whole weight for every product."""

    name = "reference"

    def why_not(self, shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
        """Supports everything."""
        return None

    def prepare(self, weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> PackedTensors:
        """The packed tensors, moved to the device."""
        tensors = {name: tensor.to(device) for name, tensor in weight.pack().items()}
        return PackedTensors(tensors, weight.bits, weight.group_size)

    def multiply(self, x: torch.Tensor, prepared: PackedTensors) -> torch.Tensor:
        """Unpack, dequantize, multiply."""
        weight = unpack_weight("", prepared.tensors, prepared.bits, prepared.group_size, zeros_offset=1)
        return torch.nn.functional.linear(x, weight.dequantize(x.dtype))
