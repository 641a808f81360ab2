"""RMS norm with the residual sum before it, in one launch (Zhang and Sennrich, 2019, arXiv 1910.07467)."""

import torch
import triton
import triton.language as tl

from quasar_core.kernels.triton.language import round_to


def rms_norm_residual(
    hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, out: torch.Tensor
) -> None:
    """hidden [T, in] += delta, in place; out = hidden ÷ √(mean square + eps), rounded, · weight.

    The roundings are those of transformers. A row's result does not depend on T.
    """
    size = hidden.shape[1]
    block = triton.next_power_of_2(size)
    _norm_kernel[(hidden.shape[0],)](
        hidden,
        delta,
        weight,
        out,
        size,
        eps,
        SIZE=block,
        HAS_DELTA=delta is not None,
        num_warps=min(max(block // 512, 1), 16),
    )


@triton.jit
def _norm_kernel(hidden_ptr, delta_ptr, weight_ptr, out_ptr, size, eps, SIZE: tl.constexpr, HAS_DELTA: tl.constexpr):
    columns = tl.arange(0, SIZE)
    known = columns < size
    places = tl.program_id(0) * size + columns
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + columns, mask=known, other=0.0).to(tl.float32)
    hidden = tl.load(hidden_ptr + places, mask=known, other=0.0).to(tl.float32)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + places, mask=known, other=0.0).to(tl.float32)
        hidden = round_to(hidden + delta, dtype)
        tl.store(hidden_ptr + places, hidden.to(dtype), mask=known)
    normed = round_to(hidden * tl.rsqrt(tl.sum(hidden * hidden, axis=0) / size + eps), dtype)
    tl.store(out_ptr + places, (normed * weight).to(dtype), mask=known)
