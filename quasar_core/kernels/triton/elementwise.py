"""The kernels between products: RMS norm with the residual sum (arXiv 1910.07467), and the MLP's gate.

Each is one launch.
"""

import torch
import triton
import triton.language as tl

from quasar_core.kernels.triton.eight_bit import LARGEST, round_row
from quasar_core.kernels.triton.language import overlap, round_to, wait


def rms_norm_residual(
    hidden: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> None:
    """hidden [T, in] += delta, in place; out = hidden ÷ √(mean square + eps), rounded, · weight.

    The roundings are those of transformers. A row's result does not depend on T. With `scales` [T] float32, `out` is of
    8 bits, and takes what `eight_bit.quantize_rows` makes of it.
    """
    size = hidden.shape[1]
    block = triton.next_power_of_2(size)
    _norm_kernel[(hidden.shape[0],)](
        hidden,
        delta,
        weight,
        out,
        scales,
        size,
        eps,
        LARGEST[out.dtype] if scales is not None else 0.0,
        SIZE=block,
        HAS_DELTA=delta is not None,
        ROUNDED=scales is not None,
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
    scales_ptr,
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
    # A weight in float32 is rounded once, with its product.
    normed = round_to(hidden * tl.rsqrt(tl.sum(hidden * hidden, axis=0) / size + eps), weight_ptr.dtype.element_ty)
    result = (normed * weight).to(dtype)
    if ROUNDED:
        result, scale = round_row(result.to(tl.float32), largest, WHOLE)
        tl.store(scales_ptr + tl.program_id(0), scale)
    tl.store(out_ptr + places, result.to(out_ptr.dtype.element_ty), mask=known)


_BLOCK = 1024


def silu_multiply(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """gate_up [T, 2·I], gates first → out [T, I]; in float32, rounded once."""
    inner = out.shape[1]
    grid = out.shape[0], triton.cdiv(inner, _BLOCK)
    _silu_kernel[grid](gate_up, out, inner, BLOCK=_BLOCK, num_warps=4, **overlap())


def silu_multiply_rounded(gate_up: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """silu(gate) · up as `eight_bit.quantize_rows` rounds it: codes [T, I] int8 or e4m3, and scales [T] float32."""
    inner = codes.shape[1]
    _silu_row_kernel[(codes.shape[0],)](
        gate_up,
        codes,
        scales,
        inner,
        LARGEST[codes.dtype],
        SIZE=triton.next_power_of_2(inner),
        WHOLE=codes.dtype == torch.int8,
        num_warps=16,
        **overlap(),
    )


@triton.jit
def _silu_kernel(gate_up_ptr, out_ptr, inner, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    wait(OVERLAPS)
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = columns < inner
    product = _gated(gate_up_ptr + row * 2 * inner + columns, inner, known)
    tl.store(out_ptr + row * inner + columns, product.to(out_ptr.dtype.element_ty), mask=known)


@triton.jit
def _silu_row_kernel(
    gate_up_ptr,
    codes_ptr,
    scales_ptr,
    inner,
    largest,
    SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait(OVERLAPS)
    row = tl.program_id(0)
    columns = tl.arange(0, SIZE)
    known = columns < inner
    product = _gated(gate_up_ptr + row * 2 * inner + columns, inner, known)
    codes, scale = round_row(round_to(product, gate_up_ptr.dtype.element_ty), largest, WHOLE)
    tl.store(codes_ptr + row * inner + columns, codes.to(codes_ptr.dtype.element_ty), mask=known)
    tl.store(scales_ptr + row, scale)


@triton.jit
def _gated(gates, inner, known):
    gate = tl.load(gates, mask=known, other=0.0).to(tl.float32)
    up = tl.load(gates + inner, mask=known, other=0.0).to(tl.float32)
    return gate / (1 + tl.exp(-gate)) * up
