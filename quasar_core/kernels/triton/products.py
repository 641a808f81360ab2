"""Products of few rows with weights of 16 bits that are read once; up to 64 rows.

The weights are the tall operand of the tensor cores and the rows of the pass the narrow one, padded to 16 or 64:
reading the weights is the cost. Whatever T is, a row's sums are taken in the same order, by the same block shapes.
Where the outputs alone would not keep the device busy, the inputs are split among programs, and the last of a block's
programs adds their sums in order; bias, residual and one rounding follow. A gated product's block holds as many gates
as up-projections, and stores silu(gate) · up.
"""

import torch
import triton
import triton.language as tl

from quasar_core.kernels.triton.blocks import Blocks, dense_blocks
from quasar_core.kernels.triton.language import fetch_rows, matrix_product, overlap, scratch, wait
from quasar_core.kernels.triton.stream import NOTHING_READ, NOTHING_WRITTEN, NextNorm, Stream


@triton.jit
def finish(
    acc,  # [BLOCK, ROWS] float32
    block,
    split,
    outputs,  # [BLOCK]
    rows,  # [ROWS]
    out_ptr,
    bias_ptr,
    residual_ptr,
    partials_ptr,
    counters_ptr,
    count,
    out_features,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    read_ptr=None,
    slots=1,
    inverse=1.0,
    eps=0.0,
    norm_ptr=None,
    scaled_ptr=None,
    written_ptr=None,
    SLOTS: tl.constexpr = 0,
    NORMS: tl.constexpr = False,
):
    """Each program leaves its part; the last to arrive at a block adds all parts, in order, whoever it is.

    So sums do not depend on which program is last, and the counter is zero again for the next call.
    """
    places = rows[None, :] * out_features + outputs[:, None]
    inside = (rows[None, :] < count) & (outputs[:, None] < out_features)
    if SPLITS == 1:
        store(
            acc, places, inside, block, outputs, rows, out_ptr, bias_ptr, residual_ptr, count, out_features, HAS_BIAS,
            HAS_RESIDUAL, GATED, read_ptr, slots, inverse, eps, norm_ptr, scaled_ptr, written_ptr, SLOTS, NORMS,
        )  # fmt: skip
    else:
        part = count * out_features
        tl.store(partials_ptr + split * part + places, acc, mask=inside)
        tl.debug_barrier()  # all threads have stored before one of them says so
        arrived = tl.atomic_add(counters_ptr + block, 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            total = tl.zeros_like(acc)
            for i in range(SPLITS):
                total += tl.load(partials_ptr + i * part + places, mask=inside, other=0.0, cache_modifier=".cg")
            store(
                total, places, inside, block, outputs, rows, out_ptr, bias_ptr, residual_ptr, count, out_features,
                HAS_BIAS, HAS_RESIDUAL, GATED, read_ptr, slots, inverse, eps, norm_ptr, scaled_ptr, written_ptr, SLOTS,
                NORMS,
            )  # fmt: skip
            tl.store(counters_ptr + block, 0)


@triton.jit
def store(
    total,
    places,
    inside,
    block,
    outputs,
    rows,
    out_ptr,
    bias_ptr,
    residual_ptr,
    count,
    out_features,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    read_ptr,
    slots,
    inverse,
    eps,
    norm_ptr,
    scaled_ptr,
    written_ptr,
    SLOTS: tl.constexpr,
    NORMS: tl.constexpr,
):
    """A norm's factor, bias, residual and gate in float32; then what the next norm needs of the sums as stored."""
    if SLOTS:
        slot = tl.arange(0, SLOTS)
        known = (rows[None, :] < count) & (slot[:, None] < slots)
        squares = tl.load(read_ptr + rows[None, :] * slots + slot[:, None], mask=known, other=0.0)
        total *= tl.rsqrt(tl.sum(squares, axis=0) * inverse + eps)[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + outputs, mask=outputs < out_features, other=0.0)
        total += bias.to(tl.float32)[:, None]
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + places, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        half: tl.constexpr = total.shape[0] // 2
        gate, up = tl.split(tl.permute(tl.reshape(total, (2, half, total.shape[1])), (1, 2, 0)))
        columns = block * half + tl.arange(0, half)
        places = rows[None, :] * (out_features // 2) + columns[:, None]
        inside = (rows[None, :] < count) & (columns[:, None] < out_features // 2)
        total = gate / (1 + tl.exp(-gate)) * up
    stored = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + places, stored, mask=inside)
    if NORMS:
        kept = tl.where(inside, stored.to(tl.float32), 0.0)
        norm = tl.load(norm_ptr + outputs, mask=outputs < out_features, other=0.0).to(tl.float32)
        tl.store(scaled_ptr + places, (kept * norm[:, None]).to(stored.dtype), mask=inside)
        blocks = tl.num_programs(0)
        tl.store(written_ptr + rows * blocks + block, tl.sum(kept * kept, axis=0), mask=rows < count)


@triton.jit
def outputs_of(block, out_features, SIZE: tl.constexpr, GATED: tl.constexpr):
    """Which outputs a program has: SIZE neighbours; or half as many gates, then the outputs that these gate."""
    line = tl.arange(0, SIZE)
    if GATED:
        half: tl.constexpr = SIZE // 2
        return block * half + line % half + line // half * (out_features // 2)
    return block * SIZE + line


LONGEST, LONGEST_DENSE = 16, 64  # rows
_WIDE_STAGES = 2  # of more than 16 rows, which take more shared memory: how many steps are under way changes no sum


def multiply_dense(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    blocks: Blocks | None = None,
    gated: bool = False,
    behind: Stream | None = None,
    before: NextNorm | None = None,
) -> None:
    """x [T, in] · weight [out, in]ᵀ (+ bias) (+ residual) → out [T, out], 16 bits; a row does not depend on T.

    `gated`: as of `multiply_packed`. T is at most 64.
    """
    chosen = blocks or dense_blocks(weight, x.device, gated)
    space, is_wide = scratch(x.device), x.shape[0] > LONGEST
    out_features, in_features = weight.shape
    steps = -(-in_features // chosen.inputs)
    _dense_kernel[(-(-out_features // chosen.outputs), chosen.splits)](
        x,
        weight,
        out,
        bias,
        residual,
        space.partials,
        space.counters,
        x.shape[0],
        in_features,
        out_features,
        steps,
        *(behind.reads if behind else NOTHING_READ),
        *(before.writes if before else NOTHING_WRITTEN),
        OUTPUTS=chosen.outputs,
        INPUTS=chosen.inputs,
        SPLITS=chosen.splits,
        STEPS=-(-steps // chosen.splits),
        TILE=LONGEST_DENSE if is_wide else LONGEST,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        GATED=gated,
        SLOTS=triton.next_power_of_2(behind.squares.shape[1]) if behind else 0,
        NORMS=before is not None,
        num_warps=4,
        num_stages=min(chosen.stages, _WIDE_STAGES) if is_wide else chosen.stages,
        **overlap(),
    )


@triton.jit(do_not_specialize=["count"])  # one kernel for every T up to 16, and one for every T beyond
def _dense_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    bias_ptr,
    residual_ptr,
    partials_ptr,
    counters_ptr,
    count,
    in_features,
    out_features,
    steps,
    read_ptr,
    slots,
    inverse,
    eps,
    norm_ptr,
    scaled_ptr,
    written_ptr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    STEPS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    SLOTS: tl.constexpr,
    NORMS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    block, split = tl.program_id(0), tl.program_id(1)
    outputs = outputs_of(block, out_features, OUTPUTS, GATED)
    rows = tl.arange(0, TILE)
    lines = weight_ptr + outputs[:, None].to(tl.int64) * in_features
    acc = tl.zeros((OUTPUTS, TILE), tl.float32)
    first = split * STEPS
    if OVERLAPS:
        fetch_rows(weight_ptr, outputs, first * INPUTS, in_features, out_features)
        wait(OVERLAPS)
    for step in range(first, tl.minimum(first + STEPS, steps)):
        inputs = step * INPUTS + tl.arange(0, INPUTS)
        known = (outputs[:, None] < out_features) & (inputs[None, :] < in_features)
        weight = tl.load(lines + inputs[None, :], mask=known, other=0.0)
        x = tl.load(
            x_ptr + rows[None, :] * in_features + inputs[:, None],
            mask=(rows[None, :] < count) & (inputs[:, None] < in_features),
            other=0.0,
        )
        acc = matrix_product(weight, x, acc)
    finish(
        acc, block, split, outputs, rows, out_ptr, bias_ptr, residual_ptr, partials_ptr, counters_ptr, count,
        out_features, SPLITS, HAS_BIAS, HAS_RESIDUAL, GATED, read_ptr, slots, inverse, eps, norm_ptr, scaled_ptr,
        written_ptr, SLOTS, NORMS,
    )  # fmt: skip
