"""RMS norm with the residual sum before it, in one launch (Zhang and Sennrich, 2019, arXiv 1910.07467)."""

import torch
import triton
import triton.language as tl

from quasar_core.kernels.triton.eight_bit import LARGEST, round_row
from quasar_core.kernels.triton.language import round_to
from quasar_core.kernels.triton.overlap import overlap, wait


def rms_norm_residual(
    hidden: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    steps: torch.Tensor | None = None,
) -> None:
    """hidden [T, in] += delta, in place; out = hidden ÷ √(mean square + eps), rounded, · weight.

    The roundings are those of transformers. A row's result does not depend on T. With `steps` [T] float32, `out` is of
    8 bits, and takes what `eight_bit.quantize_rows` makes of it.
    """
    size = hidden.shape[1]
    block = triton.next_power_of_2(size)
    _norm_kernel[(hidden.shape[0],)](
        hidden,
        delta,
        weight,
        out,
        steps,
        size,
        eps,
        LARGEST[out.dtype] if steps is not None else 0.0,
        SIZE=block,
        HAS_DELTA=delta is not None,
        ROUNDED=steps is not None,
        WHOLE=out.dtype == torch.int8,
        num_warps=min(max(block // 512, 1), 16),
        **overlap(),
    )


@triton.jit
def _norm_kernel(
    hidden_ptr,
    delta_ptr,
    weight_ptr,
    out_ptr,
    steps_ptr,
    size,
    eps,
    largest,
    SIZE: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    ROUNDED: tl.constexpr,
    WHOLE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    columns = tl.arange(0, SIZE)
    known = columns < size
    places = tl.program_id(0) * size + columns
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + columns, mask=known, other=0.0).to(tl.float32)
    wait(OVERLAPS)
    hidden = tl.load(hidden_ptr + places, mask=known, other=0.0).to(tl.float32)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + places, mask=known, other=0.0).to(tl.float32)
        hidden = round_to(hidden + delta, dtype)
        tl.store(hidden_ptr + places, hidden.to(dtype), mask=known)
    normed = round_to(hidden * tl.rsqrt(tl.sum(hidden * hidden, axis=0) / size + eps), dtype)
    result = (normed * weight).to(dtype)
    if ROUNDED:
        result, step = round_row(result.to(tl.float32), largest, WHOLE)
        tl.store(steps_ptr + tl.program_id(0), step)
    tl.store(out_ptr + places, result.to(out_ptr.dtype.element_ty), mask=known)
