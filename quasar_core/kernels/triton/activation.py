"""The gate of an MLP: silu(gate) · up."""

import torch
import triton
import triton.language as tl

from quasar_core.kernels.triton.eight_bit import LARGEST, round_row
from quasar_core.kernels.triton.language import round_to
from quasar_core.kernels.triton.overlap import overlap, wait

_BLOCK = 1024


def silu_multiply(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """gate_up [T, 2·I], gates first → out [T, I]; in float32, rounded once."""
    inner = out.shape[1]
    grid = out.shape[0], triton.cdiv(inner, _BLOCK)
    _silu_kernel[grid](gate_up, out, inner, BLOCK=_BLOCK, num_warps=4, **overlap())


def silu_multiply_rounded(gate_up: torch.Tensor, codes: torch.Tensor, steps: torch.Tensor) -> None:
    """The same as `eight_bit.quantize_rows` makes it: codes [T, I] int8 or float8_e4m3fn, and steps [T] float32."""
    inner = codes.shape[1]
    _silu_row_kernel[(codes.shape[0],)](
        gate_up,
        codes,
        steps,
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
    steps_ptr,
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
    codes, step = round_row(round_to(product, gate_up_ptr.dtype.element_ty), largest, WHOLE)
    tl.store(codes_ptr + row * inner + columns, codes.to(codes_ptr.dtype.element_ty), mask=known)
    tl.store(steps_ptr + row, step)


@triton.jit
def _gated(gates, inner, known):
    gate = tl.load(gates, mask=known, other=0.0).to(tl.float32)
    up = tl.load(gates + inner, mask=known, other=0.0).to(tl.float32)
    return gate / (1 + tl.exp(-gate)) * up
