"""The packed product on Triton behind the one kernel interface; nothing here imports Triton before it is used."""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch

from quasar_core.checkpoint.gptq_format import QuantizedWeight
from quasar_core.kernels.base import LayerShape
from quasar_core.kernels.triton.weights import SMALLEST_CHUNK, TritonWeight, chunk_size, dequantize, prepare_packed

_TUNING = 1.5  # seconds for one shape
_SKINNY = 64  # rows up to which reading the codes again for every 16 is less work than unpacking them all


class TritonKernel:
    """Codes of 2, 3 (as 4), 4 and 8 bits, unpacked in registers; products on the tensor cores, sums in float32."""

    name = "triton"

    def why_not(self, shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
        """Ordered groups of sixteens, bf16 or float16, on a GPU of the Ampere generation or later."""
        obstacle = why_not_triton(device, dtype)
        if obstacle:
            return obstacle
        if not shape.trivial_groups:
            return "its groups must be in order, and g_idx is not"
        if chunk_size(shape.in_features, shape.group_size) < SMALLEST_CHUNK:
            return f"groups of {shape.group_size} do not divide into sixteens"
        return None

    def prepare(self, weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> TritonWeight:
        """Codes, scales and zeros in the order of the tensor cores."""
        return prepare_packed(weight, device)

    def tune(self, weights: Sequence[TritonWeight], dtype: torch.dtype) -> str:
        """See `TunableKernel`."""
        return tune_shape(weights, dtype)

    def multiply(self, x: torch.Tensor, prepared: TritonWeight) -> torch.Tensor:
        """A product of any number of rows; of many, such as a prompt's, with the weight dequantized for once."""
        if x.shape[0] > _SKINNY:
            return torch.nn.functional.linear(x, dequantize(prepared, x.dtype))
        from quasar_core.kernels.triton.products import LONGEST, multiply_packed

        x = x.contiguous()
        out = x.new_empty(x.shape[0], prepared.out_features)
        for rows, part in zip(x.split(LONGEST), out.split(LONGEST), strict=True):
            multiply_packed(rows, prepared, part)
        return out


def why_not_triton(device: torch.device, dtype: torch.dtype, capability: tuple[int, int] = (8, 0)) -> str | None:
    """Why a kernel in 16 bits that needs this compute capability cannot run here, or None where it can."""
    if device.type != "cuda":
        return f"it runs on CUDA, not on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(device) < capability:
        return f"it needs compute capability {'.'.join(map(str, capability))}"
    return None if _has_triton() else "Triton is not installed"


def tune_shape(weights: Sequence[TritonWeight | torch.Tensor], dtype: torch.dtype) -> str:
    """Tune the block shapes for weights of one shape; nothing on the CPU."""
    first = weights[0].words if isinstance(weights[0], TritonWeight) else weights[0]
    if first.device.type != "cuda":
        return ""
    from quasar_core.kernels.triton.tune import tune_missing

    return tune_missing(weights, dtype, seconds=_TUNING)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
