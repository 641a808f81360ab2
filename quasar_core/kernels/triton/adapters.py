"""Put Triton's products behind the one kernel interface; nothing here imports Triton before it is used.

`torch._int_mm` and `torch._scaled_mm` want more than 16 rows, and fill up a verify's few. Here rows are rounded to 8
bits by one small launch, or by what computes them, and the product reads the weights as they are.
Letters: T rows of a pass, in and out the layer's sizes.
"""

import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from subprocess import CalledProcessError
from typing import Any

import torch

from quasar_core.checkpoint.gptq_format import QuantizedWeight
from quasar_core.kernels.base import LayerShape, RoundedRows
from quasar_core.kernels.eight_bit import FLOAT8_CAPABILITY, Float8Kernel, Int8Kernel
from quasar_core.kernels.gpu import AMPERE, first_line, on, raise_if_lost, why_not_nvidia
from quasar_core.kernels.triton.weights import SMALLEST_CHUNK, TritonWeight, chunk_size, prepare_packed

_TUNING = 1.5  # seconds for one shape
_SKINNY = 64  # rows up to which reading the codes again for every 16 is less work than dequantizing them all
_EIGHT_BIT_ROWS = 16  # of one launch; more are PyTorch's business
_EIGHT_BIT_MULTIPLE = 16  # of both sizes: rows begin where 16 bytes do


class TritonKernel:
    """Codes of 2, 3 (as 4), 4 and 8 bits, unpacked in registers; products on the tensor cores, sums in float32."""

    name = "triton"

    def __init__(self, tight: bool = False) -> None:
        self._tight = tight  # see `prepare_packed`

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
        return prepare_packed(weight, device, self._tight)

    def tune(self, weights: Sequence[TritonWeight], dtype: torch.dtype) -> str:
        """See `TunableKernel`."""
        return tune_shape(weights, dtype)

    def multiply(self, x: torch.Tensor, prepared: TritonWeight) -> torch.Tensor:
        """A product of any number of rows; of many, such as a prompt's, with the weight dequantized for once."""
        if x.shape[0] > _SKINNY:
            from quasar_core.kernels.triton.unpack import dequantize_packed

            with on(x.device):
                return torch.nn.functional.linear(x, dequantize_packed(prepared, x.dtype))
        from quasar_core.kernels.triton.packed import LONGEST, multiply_packed

        x = x.contiguous()
        out = x.new_empty(x.shape[0], prepared.out_features)
        with on(x.device):
            for rows, part in zip(x.split(LONGEST), out.split(LONGEST), strict=True):
                multiply_packed(rows, prepared, part)
        return out


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
        if shape.in_features % _EIGHT_BIT_MULTIPLE or shape.out_features % _EIGHT_BIT_MULTIPLE:
            return f"{shape.in_features} × {shape.out_features} are not multiples of {_EIGHT_BIT_MULTIPLE}"
        return None

    def prepare(self, weight: Any, device: torch.device, dtype: torch.dtype) -> Any:
        """Values and scales on the device."""
        return self._at_many_rows.prepare(weight, device, dtype)

    def tune(self, weights: Sequence[Any], dtype: torch.dtype) -> str:
        """See `TunableKernel`."""
        return tune_shape([weight.values for weight in weights], dtype)

    def multiply(self, x: torch.Tensor, prepared: Any) -> torch.Tensor:
        """Round the rows, multiply in 8 bits, apply both scales."""
        if x.shape[0] > _EIGHT_BIT_ROWS:
            product: torch.Tensor = self._at_many_rows.multiply(x, prepared)
            return product
        from quasar_core.kernels.triton.eight_bit import quantize_rows

        codes = torch.empty_like(x, dtype=prepared.values.dtype)
        rows = RoundedRows(codes, x.new_empty(x.shape[0], dtype=torch.float32))
        with on(x.device):
            quantize_rows(x.contiguous(), rows.codes, rows.scales)
        return self.multiply_rounded(rows, prepared, x.dtype)

    def rounds_to(self, rows: int, prepared: Any) -> torch.dtype | None:
        """See `RoundingKernel`."""
        values: torch.Tensor = prepared.values
        return values.dtype if rows <= _EIGHT_BIT_ROWS else None

    def multiply_rounded(self, rows: RoundedRows, prepared: Any, dtype: torch.dtype) -> torch.Tensor:
        """See `RoundingKernel`."""
        from quasar_core.kernels.triton.eight_bit import multiply_w8a8

        out = torch.empty(len(rows.codes), len(prepared.values), dtype=dtype, device=rows.codes.device)
        with on(out.device):
            multiply_w8a8(rows.codes, rows.scales, prepared.values, prepared.scales, out)
        return out


TRITON_INT8 = TritonEightBitKernel("triton-int8", Int8Kernel(), (8, 0))
TRITON_FLOAT8 = TritonEightBitKernel("triton-float8", Float8Kernel(), FLOAT8_CAPABILITY)


SWITCH = "QUASAR_TRITON"  # a variable that is 0 where PyTorch's operations are to take the place of Triton's kernels


def why_not_triton(device: torch.device, dtype: torch.dtype, capability: tuple[int, int] = AMPERE) -> str | None:
    """Why a kernel in 16 bits that needs this compute capability cannot run here, or None where it can.

    The first call for a device builds and runs one small kernel on it.
    """
    obstacle = why_not_nvidia(device, capability)
    if obstacle:
        return obstacle
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH} is 0"
    return _why_not_built(device) if _has_triton() else "Triton is not installed"


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


@cache
def _why_not_built(device: torch.device) -> str | None:
    """What keeps a small kernel from being built and run on a device; None where it ran and was right."""
    try:
        from quasar_core.kernels.triton.probe import why_not_built

        with on(device):
            return why_not_built(device)
    except Exception as error:  # Triton's own errors, a compiler's, the loader's: each is a reason
        raise_if_lost(error)
        return f"Triton cannot build its kernels here: {_reason(error)}"


def _reason(error: Exception) -> str:
    """In a line; a compiler that failed says what it said on stderr, which Triton has let through."""
    if isinstance(error, CalledProcessError):
        return f"{error.cmd[0]} failed; a C compiler and Python's headers (python3-dev) are needed"
    return first_line(error)
