"""Products in 8 bits: rows in int8 or float8 (e4m3) with a scale of their own, weights with a scale per output."""

import torch
import triton
import triton.language as tl

from quasar_core.kernels.triton.blocks import Blocks, dense_blocks
from quasar_core.kernels.triton.language import INTERPRETED, ROWS, fetch_rows, overlap, scratch, wait
from quasar_core.kernels.triton.products import finish

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize_rows(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """x [T, in] → codes [T, in] int8 or float8_e4m3fn, rounded to nearest; scales [T] float32: x ≈ codes · scales."""
    _quantize_kernel[(x.shape[0],)](
        x,
        codes,
        scales,
        x.shape[1],
        LARGEST[codes.dtype],
        SIZE=triton.next_power_of_2(x.shape[1]),
        WHOLE=codes.dtype == torch.int8,
        num_warps=8,
        **overlap(),
    )


@triton.jit
def _quantize_kernel(
    x_ptr, codes_ptr, scales_ptr, size, largest, SIZE: tl.constexpr, WHOLE: tl.constexpr, OVERLAPS: tl.constexpr
):
    wait(OVERLAPS)
    row = tl.program_id(0)
    columns = tl.arange(0, SIZE)
    known = columns < size
    x = tl.load(x_ptr + row * size + columns, mask=known, other=0.0).to(tl.float32)
    scaled, scale = round_row(x, largest, WHOLE)
    tl.store(codes_ptr + row * size + columns, scaled.to(codes_ptr.dtype.element_ty), mask=known)
    tl.store(scales_ptr + row, scale)


@triton.jit
def round_row(x, largest, WHOLE: tl.constexpr):
    """A row in float32 as a scale times numbers of at most `largest`: whole ones, or such as a cast will round."""
    peak = tl.max(tl.abs(x), axis=0)
    scale = tl.where(peak > 0, tl.div_rn(peak, largest), 1.0)
    # As the host divides; Triton's own division is off by a bit.
    scaled = tl.minimum(tl.maximum(tl.div_rn(x, scale), -largest), largest)
    if WHOLE:
        scaled = (scaled + 12582912.0) - 12582912.0  # 1.5 · 2²³: float32 has no bits left for a fraction
    return scaled, scale


def multiply_w8a8(
    codes: torch.Tensor,
    row_scales: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    blocks: Blocks | None = None,
) -> None:
    """(codes [T, in] · weight [out, in]ᵀ) · row_scales [T] · scales [out] (+ bias) (+ residual) → out [T, out].

    Codes and weight are both int8 (summed in int32) or both float8_e4m3fn (in float32); a row does not depend on T.
    """
    chosen = blocks or dense_blocks(weight, codes.device)
    space = scratch(codes.device)
    out_features, in_features = weight.shape
    count = -(-in_features // chosen.inputs)
    _w8a8_kernel[(-(-out_features // chosen.outputs), chosen.splits)](
        codes,
        row_scales,
        weight,
        scales,
        out,
        bias,
        residual,
        space.partials,
        space.counters,
        codes.shape[0],
        in_features,
        out_features,
        count,
        OUTPUTS=chosen.outputs,
        INPUTS=chosen.inputs,
        SPLITS=chosen.splits,
        STEPS=-(-count // chosen.splits),
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        num_warps=4,
        num_stages=chosen.stages,
        **overlap(),
    )


@triton.jit(do_not_specialize=["count"])  # one kernel for every T
def _w8a8_kernel(
    codes_ptr,
    row_scales_ptr,
    weight_ptr,
    scales_ptr,
    out_ptr,
    bias_ptr,
    residual_ptr,
    partials_ptr,
    counters_ptr,
    count,
    in_features,
    out_features,
    steps,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    STEPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    block, split = tl.program_id(0), tl.program_id(1)
    outputs = block * OUTPUTS + tl.arange(0, OUTPUTS)
    rows = tl.arange(0, ROWS)
    lines = weight_ptr + outputs[:, None].to(tl.int64) * in_features
    acc = tl.zeros((OUTPUTS, ROWS), tl.int32 if weight_ptr.dtype.element_ty == tl.int8 else tl.float32)
    first = split * STEPS
    if OVERLAPS:
        fetch_rows(weight_ptr, outputs, first * INPUTS, in_features, out_features)
        wait(OVERLAPS)
    for step in range(first, tl.minimum(first + STEPS, steps)):
        inputs = step * INPUTS + tl.arange(0, INPUTS)
        known = (outputs[:, None] < out_features) & (inputs[None, :] < in_features)
        inside = (rows[None, :] < count) & (inputs[:, None] < in_features)
        weight = tl.load(lines + inputs[None, :], mask=known, other=0.0)
        x = tl.load(codes_ptr + rows[None, :] * in_features + inputs[:, None], mask=inside, other=0.0)
        acc = _eight_bit_product(weight, x, acc)
    row_scale = tl.load(row_scales_ptr + rows, mask=rows < count, other=0.0)
    scale = tl.load(scales_ptr + outputs, mask=outputs < out_features, other=0.0)
    total = acc.to(tl.float32) * scale[:, None] * row_scale[None, :]
    finish(
        total, block, split, outputs, rows, out_ptr, bias_ptr, residual_ptr, partials_ptr, counters_ptr, count,
        out_features, SPLITS, HAS_BIAS, HAS_RESIDUAL, False,
    )  # fmt: skip


@triton.jit
def _eight_bit_product(a, b, acc):
    """Float8 sums leave the tensor cores' short accumulator after 128 inputs, as in cuBLAS."""
    if INTERPRETED:
        result = acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee").to(acc.dtype)
    elif a.dtype == tl.int8:
        result = tl.dot(a, b, acc, out_dtype=tl.int32)
    else:
        result = tl.dot(a, b, acc, max_num_imprecise_acc=128)
    return result
