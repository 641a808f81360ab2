"""Products of few rows with weights that are read once: packed codes (up to 16 rows), or 16-bit numbers (up to 64).

The weights are the tall operand of the tensor cores and the rows of the pass the narrow one, padded to 16 or 64:
reading the weights is the cost. Whatever T is, a row's sums are taken in the same order, by the same block shapes.
Where the outputs alone would not keep the device busy, the inputs are split among programs, and the last of a block's
programs adds their sums in order; bias, residual and one rounding follow. A gated product's block holds as many gates
as up-projections, and stores silu(gate) · up.
"""

import torch
import triton
import triton.language as tl

from quasar_core.kernels.triton.blocks import Blocks, dense_blocks, packed_blocks
from quasar_core.kernels.triton.language import (
    INTERPRETED,
    ROWS,
    fetch_lines,
    fetch_rows,
    matrix_product,
    overlap,
    scratch,
    subtract_pairs,
    wait,
)
from quasar_core.kernels.triton.weights import BLOCK, TritonWeight


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
):
    """Each program leaves its part; the last to arrive at a block adds all parts, in order, whoever it is.

    So sums do not depend on which program is last, and the counter is zero again for the next call.
    """
    places = rows[None, :] * out_features + outputs[:, None]
    inside = (rows[None, :] < count) & (outputs[:, None] < out_features)
    if SPLITS == 1:
        store(
            acc, places, inside, block, outputs, rows, out_ptr, bias_ptr, residual_ptr, count, out_features, HAS_BIAS,
            HAS_RESIDUAL, GATED,
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
                HAS_BIAS, HAS_RESIDUAL, GATED,
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
):
    """Bias and residual added in float32, and the gate in float32 too."""
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
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=inside)


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
_MAGIC = {torch.bfloat16: 0x43004300, torch.float16: 0x64006400}  # 128 and 1024: the last bit is worth 1


def multiply_packed(
    x: torch.Tensor,
    weight: TritonWeight,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    blocks: Blocks | None = None,
    gated: bool = False,
) -> None:
    """x [T, in] · Wᵀ (+ bias [out]) (+ residual [T, out]) → out [T, out]; a row's result does not depend on T.

    `gated` stores silu(gate) · up in out [T, out ÷ 2], the first half of the outputs being gates (no residual then);
    its blocks have two stored ones, or more.
    """
    chosen = blocks or packed_blocks(weight, x.device, gated)
    space = scratch(x.device)
    _packed_kernel[(-(-weight.words.shape[0] // (chosen.outputs // BLOCK)), chosen.splits)](
        x,
        weight.words,
        weight.scales,
        weight.zeros,
        out,
        bias,
        residual,
        space.partials,
        space.counters,
        x.shape[0],
        weight.in_features,
        weight.out_features,
        weight.words.shape[0],
        weight.steps,
        weight.scales.shape[1],
        _MAGIC[x.dtype],
        BITS=weight.bits,
        MIDDLE=weight.middle,
        CHUNK=weight.chunk,
        CHUNKS_PER_GROUP=weight.chunks_per_group,
        STORED=chosen.outputs // BLOCK,
        SPLITS=chosen.splits,
        STEPS=-(-weight.steps // chosen.splits),
        HAS_ZEROS=weight.zeros is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        GATED=gated,
        num_warps=4,
        num_stages=chosen.stages,
        **overlap(),
    )


@triton.jit(do_not_specialize=["count"])  # one kernel for every T
def _packed_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    bias_ptr,
    residual_ptr,
    partials_ptr,
    counters_ptr,
    count,
    in_features,
    out_features,
    stored_blocks,
    steps,
    table_width,
    magic,
    BITS: tl.constexpr,
    MIDDLE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS_PER_GROUP: tl.constexpr,
    STORED: tl.constexpr,
    SPLITS: tl.constexpr,
    STEPS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    block, split = tl.program_id(0), tl.program_id(1)
    chunks: tl.constexpr = 16 // BITS
    size: tl.constexpr = 64 * STORED
    stored = outputs_of(block, stored_blocks, STORED, GATED)
    stored = tl.minimum(stored, stored_blocks - 1)  # a last block that is not whole reads what it will not write
    outputs = outputs_of(block, out_features, size, GATED)
    columns = tl.minimum(outputs, table_width - 1)
    rows = tl.arange(0, ROWS)
    inside = rows[None, :] < count
    acc = tl.zeros((size, ROWS), tl.float32)
    first = split * STEPS
    if OVERLAPS:
        _fetch_words(words_ptr, stored, first, steps, CHUNK)
        wait(OVERLAPS)
    scale, zero = load_tables(
        scales_ptr, zeros_ptr, first * chunks, columns, table_width, CHUNKS_PER_GROUP, HAS_ZEROS, MIDDLE
    )
    for step in range(first, tl.minimum(first + STEPS, steps)):
        words = load_words(words_ptr, stored, step, steps, STORED, CHUNK)
        for i in tl.static_range(chunks):
            chunk = step * chunks + i
            # Of the next chunk, so that the wait for them passes during this one.
            next_scale, next_zero = load_tables(
                scales_ptr, zeros_ptr, chunk + 1, columns, table_width, CHUNKS_PER_GROUP, HAS_ZEROS, MIDDLE
            )
            inputs = chunk * CHUNK + tl.arange(0, CHUNK)
            x = tl.load(
                x_ptr + rows[None, :] * in_features + inputs[:, None],
                mask=inside & (inputs[:, None] < in_features),
                other=0.0,
            )
            part = tl.zeros((size, ROWS), tl.float32)
            if BITS == 8:
                high = _numbers(words >> (8 * i + 4), zero >> 4, 15, magic, x)
                part = matrix_product(high, x, part) * 16
                low = _numbers(words >> (8 * i), zero & 15, 15, magic, x)
                part = matrix_product(low, x, part)
            else:
                part = matrix_product(_numbers(words >> (BITS * i), zero, 2**BITS - 1, magic, x), x, part)
            acc += part * scale[:, None]
            scale, zero = next_scale, next_zero
    finish(
        acc, block, split, outputs, rows, out_ptr, bias_ptr, residual_ptr, partials_ptr, counters_ptr, count,
        out_features, SPLITS, HAS_BIAS, HAS_RESIDUAL, GATED,
    )  # fmt: skip


@triton.jit
def load_tables(
    scales_ptr,
    zeros_ptr,
    chunk,
    columns,
    width,
    CHUNKS_PER_GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    MIDDLE: tl.constexpr,
):
    """Scales (float32) and zeros (int32) of the outputs in a chunk's group."""
    places = (chunk // CHUNKS_PER_GROUP) * width + columns
    scale = tl.load(scales_ptr + places).to(tl.float32)
    zero = tl.load(zeros_ptr + places).to(tl.int32) if HAS_ZEROS else tl.zeros_like(columns) + MIDDLE
    return scale, zero


@triton.jit
def load_words(words_ptr, stored, step, steps, STORED: tl.constexpr, CHUNK: tl.constexpr):
    """The words [64·STORED, CHUNK/2] of a step, each already with the lane that multiplies by it."""
    fragments: tl.constexpr = CHUNK // 16
    start = (stored.to(tl.int64) * steps + step) * (512 * fragments)
    words = tl.load(words_ptr + start[:, None] + tl.arange(0, 512 * fragments)[None, :])
    words = tl.reshape(words, (STORED, fragments, 4, 8, 4, 2, 2))  # s f b g t c r
    words = tl.permute(words, (0, 2, 6, 3, 1, 5, 4))  # s b r g | f c t
    return tl.reshape(words, (64 * STORED, CHUNK // 2))


@triton.jit
def _fetch_words(words_ptr, stored, first, steps, CHUNK: tl.constexpr):
    """Ask for the words of a program's first two steps, in lines of 128 bytes: a block's steps follow one another."""
    size: tl.constexpr = 512 * (CHUNK // 16)
    begin = stored.to(tl.int64) * steps
    places = (begin + first)[:, None] * size + tl.arange(0, size // 16)[None, :] * 32
    fetch_lines(words_ptr + tl.minimum(places, ((begin + steps) * size - 1)[:, None]))


@triton.jit
def codes_of_words(shifted, MASK: tl.constexpr):
    """The codes [outputs, CHUNK] of a chunk, as whole numbers."""
    halves = tl.join(shifted & MASK, (shifted >> 16) & MASK)
    return tl.reshape(halves, (shifted.shape[0], 2 * shifted.shape[1]))


@triton.jit
def _numbers(shifted, zero, MASK: tl.constexpr, magic, x):
    """Pairs of codes, less their zero, as numbers [outputs, CHUNK] of x's dtype.

    A code in the last bits of 128 (bfloat16; 1024 in float16) is that number plus the code, so no conversion is needed.
    """
    pairs = shifted & (MASK | MASK << 16)
    if INTERPRETED:
        return (codes_of_words(pairs, MASK) - zero[:, None]).to(tl.float32)
    pairs = subtract_pairs(pairs | magic, (magic | zero | zero << 16)[:, None], x.dtype)
    halves = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    return tl.reshape(halves, (shifted.shape[0], x.shape[0])).to(x.dtype, bitcast=True)


def multiply_dense(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    blocks: Blocks | None = None,
    gated: bool = False,
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
        OUTPUTS=chosen.outputs,
        INPUTS=chosen.inputs,
        SPLITS=chosen.splits,
        STEPS=-(-steps // chosen.splits),
        TILE=LONGEST_DENSE if is_wide else LONGEST,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        GATED=gated,
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
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    STEPS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
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
        out_features, SPLITS, HAS_BIAS, HAS_RESIDUAL, GATED,
    )  # fmt: skip
