"""W8A8 and 8-bit floating point on Triton behind the one kernel interface; nothing here imports Triton before its use.

`torch._int_mm` and `torch._scaled_mm` want more than 16 rows, and fill up a verify's few. Here rows are rounded by one
small launch, or by what computes them, and the product reads the weights as they are. Letters: T rows of a pass, in and
out the layer's sizes.
"""

from collections.abc import Sequence
from typing import Any

import torch

from quasar_core.kernels.base import LayerShape, RoundedRows
from quasar_core.kernels.eight_bit import FLOAT8_CAPABILITY, Float8Kernel, Int8Kernel
from quasar_core.kernels.triton.adapters import tune_shape, why_not_triton

_MULTIPLE = 16  # of both sizes: rows begin where 16 bytes do
_SKINNY = 16  # rows of one launch; more are PyTorch's business


class TritonEightBitKernel:
    """Weights as the kernel that stands for it at many rows prepares them: values [out, in], scales [out]."""

    def __init__(self, name: str, at_many_rows: Any, capability: tuple[int, int]) -> None:
        self.name = name
        self._at_many_rows, self._capability = at_many_rows, capability

    def why_not(self, shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
        """One scale per output and no zeros, sizes in sixteens, bf16 or float16, on a GPU that has the units."""
        obstacle = why_not_triton(device, dtype, self._capability) or self._at_many_rows.why_not(shape, device, dtype)
        if obstacle:
            return str(obstacle)
        if not shape.symmetric:
            return "it takes symmetric codes"
        if shape.in_features % _MULTIPLE or shape.out_features % _MULTIPLE:
            return f"{shape.in_features} × {shape.out_features} are not multiples of {_MULTIPLE}"
        return None

    def prepare(self, weight: Any, device: torch.device, dtype: torch.dtype) -> Any:
        """Values and scales on the device."""
        return self._at_many_rows.prepare(weight, device, dtype)

    def tune(self, weights: Sequence[Any], dtype: torch.dtype) -> str:
        """See `TunableKernel`."""
        return tune_shape([weight.values for weight in weights], dtype)

    def multiply(self, x: torch.Tensor, prepared: Any) -> torch.Tensor:
        """Round the rows, multiply in 8 bits, apply both scales."""
        if x.shape[0] > _SKINNY:
            product: torch.Tensor = self._at_many_rows.multiply(x, prepared)
            return product
        from quasar_core.kernels.triton.eight_bit import quantize_rows

        codes = torch.empty_like(x, dtype=prepared.values.dtype)
        rows = RoundedRows(codes, x.new_empty(x.shape[0], dtype=torch.float32))
        quantize_rows(x.contiguous(), rows.codes, rows.scales)
        return self.multiply_rounded(rows, prepared, x.dtype)

    def rounds_to(self, rows: int, prepared: Any) -> torch.dtype | None:
        """See `RoundingKernel`."""
        values: torch.Tensor = prepared.values
        return values.dtype if rows <= _SKINNY else None

    def multiply_rounded(self, rows: RoundedRows, prepared: Any, dtype: torch.dtype) -> torch.Tensor:
        """See `RoundingKernel`."""
        from quasar_core.kernels.triton.eight_bit import multiply_w8a8

        out = torch.empty(len(rows.codes), len(prepared.values), dtype=dtype, device=rows.codes.device)
        multiply_w8a8(rows.codes, rows.scales, prepared.values, prepared.scales, out)
        return out


TRITON_INT8 = TritonEightBitKernel("triton-int8", Int8Kernel(), (8, 0))
TRITON_FLOAT8 = TritonEightBitKernel("triton-float8", Float8Kernel(), FLOAT8_CAPABILITY)
