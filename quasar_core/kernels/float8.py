"""Weights and activations in 8-bit floating point (e4m3), on the matrix units of GPUs that have it.

One scale per output, one step per token (`torch._scaled_mm`, scaled by rows). Elsewhere the weight is unpacked once, at
load; asked for by name, the kernel there computes what the matrix units would, in float32.
Letters: T rows of a pass, in and out the layer's sizes.
"""

import torch

from quasar_core.checkpoint.compressed_tensors import FLOAT8, LARGEST, Float8Weight
from quasar_core.kernels.base import LayerShape

CAPABILITY = (8, 9)  # the first with e4m3 units: Ada, then Hopper
_MULTIPLE = 16  # of both sizes


class Float8Kernel:
    """8-bit floating-point products."""

    name = "float8"

    def why_not(self, shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
        """CUDA of capability 8.9 or more, bf16, sizes that are multiples of 16."""
        if device.type != "cuda":
            return f"it runs on CUDA, not on {device.type}"
        if torch.cuda.get_device_capability(device) < CAPABILITY:
            return "it needs a GPU of compute capability 8.9 or more"
        if dtype != torch.bfloat16:
            return f"it takes bfloat16, not {str(dtype).removeprefix('torch.')}"
        if shape.in_features % _MULTIPLE or shape.out_features % _MULTIPLE:
            return f"{shape.in_features} × {shape.out_features} are not multiples of {_MULTIPLE}"
        return None

    def prepare(self, weight: Float8Weight, device: torch.device, dtype: torch.dtype) -> Float8Weight:
        """The values and scales as they are stored, on the device."""
        return Float8Weight(weight.values.to(device), weight.scales.float().to(device))

    def multiply(self, x: torch.Tensor, prepared: Float8Weight) -> torch.Tensor:
        """Round the rows, multiply with both scales."""
        rows, steps = quantize_rows_float8(x)
        if not x.is_cuda:
            return (torch.nn.functional.linear(rows.float(), prepared.values.float()) * steps * prepared.scales).to(x)
        return torch._scaled_mm(
            rows, prepared.values.t(), scale_a=steps, scale_b=prepared.scales[None, :], out_dtype=x.dtype
        )


def quantize_rows_float8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, in] → e4m3 [T, in] and float32 steps [T, 1], with x ≈ step · value; one step per row."""
    x = x.float()
    steps = x.abs().amax(dim=1, keepdim=True) / LARGEST
    scaled = x / steps.clamp_min(torch.finfo(torch.float32).tiny)
    return scaled.clamp(-LARGEST, LARGEST).to(FLOAT8), steps
