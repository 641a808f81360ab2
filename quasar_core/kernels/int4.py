"""PyTorch's own packed int4 products, on the CPU and (tinygemm) on CUDA.

Both compute w = (code − 8) · scale + zero with scale and zero in the dtype of the input. PyTorch gives them no public
name; quantized exports of PyTorch itself rely on these operators.
"""

from dataclasses import dataclass

import torch

from quasar_core.checkpoint.gptq_format import QuantizedWeight
from quasar_core.kernels.base import LayerShape
from quasar_core.kernels.gpu import architecture, why_not_nvidia

GROUPS = (32, 64, 128, 256)
CDNA = ("gfx90a", "gfx94", "gfx95")  # AMD's architectures that PyTorch builds tinygemm for


@dataclass(frozen=True)
class Int4Weight:
    """Codes in the operator's layout, and [G, out, 2] scales and zeros."""

    codes: torch.Tensor
    group_size: int
    scales_and_zeros: torch.Tensor


def _why_not_layout(shape: LayerShape) -> str | None:
    if shape.bits != 4:
        return f"it takes 4-bit codes, not {shape.bits}-bit"
    group_size = shape.in_features if shape.group_size == -1 else shape.group_size
    if group_size not in GROUPS:
        return f"it takes groups of {', '.join(map(str, GROUPS))}, not {group_size}"
    if shape.in_features % group_size:
        return f"{shape.in_features} inputs are not a multiple of the group size {group_size}"
    if not shape.trivial_groups:
        return "its groups must be in order, and g_idx is not"
    return None


def _scales_and_zeros(weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    scales = weight.scales.float()
    zeros = (8 - weight.zeros.float()) * scales
    return torch.stack([scales, zeros], dim=-1).to(device, dtype).contiguous()


def _group_size(weight: QuantizedWeight) -> int:
    return weight.in_features if weight.group_size == -1 else weight.group_size


class CpuInt4Kernel:
    """`_weight_int4pack_mm_for_cpu`."""

    name = "torch-int4-cpu"

    def why_not(self, shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
        """4 bits, ordered groups, outputs in sixteens, bf16, on a CPU: in others it is slower than dequantized."""
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device.type}"
        if dtype != torch.bfloat16:
            return f"it is fast in bfloat16 alone, not in {str(dtype).removeprefix('torch.')}"
        if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
            return f"PyTorch {torch.__version__} does not have it"
        if shape.out_features % 16:
            return f"{shape.out_features} outputs are not a multiple of 16"
        return _why_not_layout(shape)

    def prepare(self, weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> Int4Weight:
        """Codes as [out, in] int32, then PyTorch's layout for this processor."""
        codes = weight.codes.t().to(torch.int32).contiguous()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return Int4Weight(packed, _group_size(weight), _scales_and_zeros(weight, device, dtype))

    def multiply(self, x: torch.Tensor, prepared: Int4Weight) -> torch.Tensor:
        """One packed product."""
        product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), prepared.codes, prepared.group_size, prepared.scales_and_zeros
        )
        return product


class CudaInt4Kernel:
    """`_weight_int4pack_mm`, tinygemm."""

    name = "torch-int4-cuda"
    inner_k_tiles = 8

    def why_not(self, shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
        """4 bits, ordered groups, bf16, on NVIDIA's GPUs from Ampere on, and on AMD's CDNA from the second on."""
        if device.type != "cuda":
            return f"it runs on CUDA, not on {device.type}"
        if dtype != torch.bfloat16:
            return f"it takes bfloat16, not {str(dtype).removeprefix('torch.')}"
        obstacle = self._why_not_gpu(device)
        if obstacle:
            return obstacle
        if shape.out_features % 8 or shape.in_features % (16 * self.inner_k_tiles):
            return f"{shape.out_features} × {shape.in_features} is not a multiple of 8 × {16 * self.inner_k_tiles}"
        return _why_not_layout(shape)

    def _why_not_gpu(self, device: torch.device) -> str | None:
        if torch.version.hip is None:
            return why_not_nvidia(device)
        name = architecture(device)
        return None if name.startswith(CDNA) else f"PyTorch has it for AMD's CDNA from the second on, not for {name}"

    def prepare(self, weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> Int4Weight:
        """Pairs of codes in bytes, the even one in the high half, then the tensor cores' layout."""
        codes = weight.codes.t().to(device, torch.int32)
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8).contiguous()
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs, self.inner_k_tiles)
        return Int4Weight(packed, _group_size(weight), _scales_and_zeros(weight, device, dtype))

    def multiply(self, x: torch.Tensor, prepared: Int4Weight) -> torch.Tensor:
        """One packed product."""
        product: torch.Tensor = torch.ops.aten._weight_int4pack_mm(
            x.contiguous(), prepared.codes, prepared.group_size, prepared.scales_and_zeros
        )
        return product
