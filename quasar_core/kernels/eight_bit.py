"""Products of 8-bit weights, one scale per output, and activations rounded to 8 bits with one scale per token.

`int8` (W8A8) is what the paper's verifier computes, and SmoothQuant's O1 (Xiao et al., 2023, arXiv 2211.10438): the
product runs in integers, on the int8 matrix units of a GPU or of a processor, and both scales are applied to its sums.
`float8` (e4m3) runs on the matrix units of GPUs that have it (`torch._scaled_mm`, scaled by rows). Elsewhere such a
weight is dequantized once, at load; asked for by name, the kernel there computes what the matrix units would, in
float32.
Letters: T rows of a pass, in and out the layer's sizes.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch.nn.functional import pad

from quasar_core.checkpoint.compressed_tensors import FLOAT8, Float8Weight
from quasar_core.checkpoint.compressed_tensors import LARGEST as LARGEST_FLOAT8
from quasar_core.checkpoint.gptq_format import QuantizedWeight
from quasar_core.kernels.base import LayerShape
from quasar_core.kernels.gpu import why_not_nvidia

LARGEST_INT8 = 127  # the scales are symmetric: −128 has no use
_CUDA_ROWS = 32  # torch._int_mm takes more than 16 rows there, and sizes that are multiples of 8
_CUDA_MULTIPLE = 8
FLOAT8_CAPABILITY = (8, 9)  # the first with e4m3 units: Ada, then Hopper
_FLOAT8_MULTIPLE = 16  # of both sizes
_EXACT_INPUTS = (1 << 24) // LARGEST_INT8**2  # whose products float32 adds up exactly


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
        """Round the rows, multiply in integers, apply both scales."""
        rows, row_scales = quantize_rows_int8(x)
        sums = integer_product(rows, prepared.values)[:, : len(prepared.scales)].float()
        if prepared.zeros is not None:
            sums -= rows.sum(dim=1, dtype=torch.int32)[:, None] * prepared.zeros
        return (sums * row_scales * prepared.scales).to(x.dtype)


def quantize_rows_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, in] → int8 [T, in] and float32 scales [T, 1], with x ≈ scale · value; symmetric, one scale per row."""
    x = x.float()
    scales = x.abs().amax(dim=1, keepdim=True) / LARGEST_INT8
    return torch.round(x / scales.clamp_min(torch.finfo(torch.float32).tiny)).to(torch.int8), scales


def integer_product(rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """int8 [T, in] × int8 [out, in] → int32 [T, out]; on CUDA few rows are filled up to what the matrix units take."""
    missing = max(0, _CUDA_ROWS - rows.shape[0]) if rows.is_cuda else 0
    filled = pad(rows, (0, values.shape[1] - rows.shape[1], 0, missing))
    if not rows.is_cuda and product_saturates():
        return _product_in_float32(filled, values)
    return torch._int_mm(filled, values.t())[: rows.shape[0]]


@cache
def product_saturates() -> bool:
    """Whether PyTorch's integer products on the CPU are wrong, as oneDNN's are on processors without VNNI.

    Their instruction (vpmaddubsw) adds two products of bytes in 16 bits, and cuts off what is larger.
    """
    rows, values = (torch.full((count, 256), LARGEST_INT8, dtype=torch.int8) for count in (17, 40))
    return bool((torch._int_mm(rows, values.t()) != 256 * LARGEST_INT8**2).any())


def _product_in_float32(rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The integer product exactly, in float32: so many inputs at a time that no sum has more bits than a float's."""
    total = torch.zeros(len(rows), len(values), dtype=torch.int32)
    for some, weights in zip(rows.split(_EXACT_INPUTS, 1), values.split(_EXACT_INPUTS, 1), strict=True):
        total += (some.float() @ weights.float().t()).to(torch.int32)
    return total


class Float8Kernel:
    """8-bit floating-point products."""

    name = "float8"

    def why_not(self, shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
        """CUDA of capability 8.9 or more, bf16, sizes that are multiples of 16."""
        obstacle = why_not_nvidia(device, FLOAT8_CAPABILITY)  # AMD's e4m3 is another one up to the MI300
        if obstacle:
            return obstacle
        if dtype != torch.bfloat16:
            return f"it takes bfloat16, not {str(dtype).removeprefix('torch.')}"
        if shape.in_features % _FLOAT8_MULTIPLE or shape.out_features % _FLOAT8_MULTIPLE:
            return f"{shape.in_features} × {shape.out_features} are not multiples of {_FLOAT8_MULTIPLE}"
        return None

    def prepare(self, weight: Float8Weight, device: torch.device, dtype: torch.dtype) -> Float8Weight:
        """The values and scales as they are stored, on the device."""
        return Float8Weight(weight.values.to(device), weight.scales.float().to(device))

    def multiply(self, x: torch.Tensor, prepared: Float8Weight) -> torch.Tensor:
        """Round the rows, multiply with both scales."""
        rows, row_scales = quantize_rows_float8(x)
        if not x.is_cuda:
            return (
                torch.nn.functional.linear(rows.float(), prepared.values.float()) * row_scales * prepared.scales
            ).to(x)
        return torch._scaled_mm(
            rows, prepared.values.t(), scale_a=row_scales, scale_b=prepared.scales[None, :], out_dtype=x.dtype
        )


def quantize_rows_float8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, in] → e4m3 [T, in] and float32 scales [T, 1], with x ≈ scale · value; one scale per row."""
    x = x.float()
    scales = x.abs().amax(dim=1, keepdim=True) / LARGEST_FLOAT8
    scaled = x / scales.clamp_min(torch.finfo(torch.float32).tiny)
    return scaled.clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(FLOAT8), scales
