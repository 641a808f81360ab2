"""W8A8: 8-bit weights, one scale per output, times activations rounded to 8 bits with one step per token.

What the paper's verifier computes, and SmoothQuant's O1 (Xiao et al., 2023, arXiv 2211.10438): the product runs in
integers, on the int8 matrix units of a GPU or of a processor, and both scales are applied to its sums.
Letters: T rows of a pass, in and out the layer's sizes.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from quasar_core.checkpoint.gptq_format import QuantizedWeight
from quasar_core.kernels.base import LayerShape

LARGEST = 127  # the steps are symmetric: −128 has no use
_CUDA_ROWS = 32  # torch._int_mm takes more than 16 rows there, and sizes that are multiples of 8
_CUDA_MULTIPLE = 8


@dataclass(frozen=True)
class Int8Weight:
    """Values [out, in] around their zeros, scales [out], and zeros [out] where they are not all 0.

    On CUDA the values are filled up to sizes that the matrix units take.
    """

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None


class Int8Kernel:
    """The integer product of PyTorch, `torch._int_mm`."""

    name = "int8"

    def why_not(self, shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
        """8 bits in one group per output."""
        if device.type not in ("cpu", "cuda"):
            return f"it runs on the CPU and on CUDA, not on {device.type}"
        if shape.bits != 8:
            return f"it runs on 8-bit codes, not on {shape.bits}-bit ones"
        if shape.group_size != -1:
            return f"it runs on one scale per output, not on groups of {shape.group_size}"
        return None

    def prepare(self, weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> Int8Weight:
        """Codes around 128 as signed bytes, output after output."""
        values = (weight.codes.to(device).to(torch.int16) - 128).to(torch.int8).t().contiguous()
        if device.type == "cuda":
            values = pad(values, (0, -values.shape[1] % _CUDA_MULTIPLE, 0, -values.shape[0] % _CUDA_MULTIPLE))
        zeros = weight.zeros[0].float() - 128
        return Int8Weight(
            values,
            weight.scales[0].float().to(device),
            zeros.to(device) if bool(zeros.any()) else None,
        )

    def multiply(self, x: torch.Tensor, prepared: Int8Weight) -> torch.Tensor:
        """Round the rows, multiply in integers, apply steps and scales."""
        rows, steps = quantize_rows(x)
        sums = integer_product(rows, prepared.values)[:, : len(prepared.scales)].float()
        if prepared.zeros is not None:
            sums -= rows.sum(dim=1, dtype=torch.int32)[:, None] * prepared.zeros
        return (sums * steps * prepared.scales).to(x.dtype)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, in] → int8 [T, in] and float32 steps [T, 1], with x ≈ step · value; symmetric, one step per row."""
    x = x.float()
    steps = x.abs().amax(dim=1, keepdim=True) / LARGEST
    return torch.round(x / steps.clamp_min(torch.finfo(torch.float32).tiny)).to(torch.int8), steps


def integer_product(rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """int8 [T, in] × int8 [out, in] → int32 [T, out]; on CUDA few rows are filled up to what the matrix units take."""
    missing = max(0, _CUDA_ROWS - rows.shape[0]) if rows.is_cuda else 0
    filled = pad(rows, (0, values.shape[1] - rows.shape[1], 0, missing))
    return torch._int_mm(filled, values.t())[: rows.shape[0]]
