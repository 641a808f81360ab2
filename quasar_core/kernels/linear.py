"""A linear layer on packed codes."""

from typing import cast

import torch

from quasar_core.checkpoint.compressed_tensors import PackedWeight
from quasar_core.checkpoint.float8 import Float8Weight
from quasar_core.checkpoint.packing import QuantizedWeight
from quasar_core.kernels.base import LayerShape
from quasar_core.kernels.float8 import select_float8
from quasar_core.kernels.select import KernelChoice, select_kernel


class PackedLinear(torch.nn.Module):
    """Stands where a `torch.nn.Linear` stood: x [..., in] → [..., out]."""

    def __init__(
        self,
        weight: PackedWeight,
        bias: torch.Tensor | None,
        choice: KernelChoice,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.bits, self.group_size = weight.bits, weight.group_size
        self.choice = choice
        # A floating-point weight comes with a kernel that takes it.
        self.prepared = choice.kernel.prepare(cast(QuantizedWeight, weight), device, dtype)
        self.bias = bias

    @classmethod
    def build(
        cls,
        weight: PackedWeight,
        bias: torch.Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
        requested: str = "auto",
    ) -> "PackedLinear":
        """Choose the kernel and prepare the weight."""
        if isinstance(weight, Float8Weight):
            choice = select_float8(weight, device, dtype, requested)
        else:
            choice = select_kernel(LayerShape.of(weight), device, dtype, requested)
        return cls(weight, bias, choice, device, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply by the packed weight and add the bias."""
        rows = x.reshape(-1, self.in_features)
        y = self.choice.kernel.multiply(rows, self.prepared)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.in_features} → {self.out_features}, {self.bits} bits, {self.choice.kernel.name}"
