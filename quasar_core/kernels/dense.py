"""The dense path: dequantized once, at load, then a plain product: no memory is saved, many rows are fast."""

import torch

from quasar_core.checkpoint.packing import QuantizedWeight
from quasar_core.kernels.base import LayerShape


class DenseKernel:
    """Holds the weight as `torch.nn.Linear` does."""

    name = "dense"

    def why_not(self, shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
        """Supports everything."""
        return None

    def prepare(self, weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in] that the codes stand for."""
        return weight.dequantize(dtype).to(device)

    def multiply(self, x: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        """One dense product."""
        return torch.nn.functional.linear(x, prepared)
