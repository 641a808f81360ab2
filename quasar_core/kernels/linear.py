"""A linear layer on packed codes."""

import torch

from quasar_core.checkpoint.compressed_tensors import PackedWeight
from quasar_core.kernels.base import LayerShape, RoundedRows, RoundingKernel
from quasar_core.kernels.select import KernelChoice, routed_kernel, select_kernel
from quasar_core.records import Progress, no_progress


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
        self.prepared = choice.kernel.prepare(weight, device, dtype)
        self.bias = bias

    @classmethod
    def build(
        cls,
        weight: PackedWeight,
        bias: torch.Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
        requested: str = "auto",
        progress: Progress = no_progress,
        *,
        routed: bool = False,
    ) -> "PackedLinear":
        """Choose the kernel and prepare the weight; of an expert that tokens choose where it is `routed`."""
        shape = LayerShape.of(weight)
        choice = routed_kernel(shape, device, dtype) if routed and requested == "auto" else None
        choice = choice or select_kernel(shape, device, dtype, requested, progress)
        return cls(weight, bias, choice, device, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply by the packed weight and add the bias."""
        rows = x.reshape(-1, self.in_features)
        y = self.choice.kernel.multiply(rows, self.prepared)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def rounds_to(self, rows: int) -> torch.dtype | None:
        """The 8-bit dtype in which it takes so many rows; None where it takes them as they are."""
        kernel = self.choice.kernel
        return kernel.rounds_to(rows, self.prepared) if isinstance(kernel, RoundingKernel) else None

    def multiply_rounded(self, rows: RoundedRows, dtype: torch.dtype) -> torch.Tensor:
        """The product of rows that come rounded, and the bias → [T, out] in `dtype`."""
        assert isinstance(self.choice.kernel, RoundingKernel)
        y = self.choice.kernel.multiply_rounded(rows, self.prepared, dtype)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.in_features} → {self.out_features}, {self.bits} bits, {self.choice.kernel.name}"
