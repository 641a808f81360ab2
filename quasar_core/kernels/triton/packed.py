"""Products of few rows with packed codes, which are read once and unpacked in registers; up to 16 rows.

The codes are the tall operand of the tensor cores, and the rows of the pass the narrow one: eight of them, or twice
eight, which take the same codes. On every GPU the instruction is the one of Ampere (`mma.sync`, 16 outputs, 8 rows, 16
inputs): its registers are those that codes are unpacked in, it waits for nothing but them, and a program takes little
shared memory, so that four or more share a multiprocessor. What the end of a product does is `products.py`'s.
"""

import torch
import triton
import triton.language as tl

from quasar_core.kernels.triton.blocks import TILE_ROWS, Blocks, packed_blocks
from quasar_core.kernels.triton.language import (
    INTERPRETED,
    fetch_lines,
    matrix_product,
    overlap,
    scratch,
    subtract_pairs,
    wait,
)
from quasar_core.kernels.triton.products import finish, outputs_of
from quasar_core.kernels.triton.stream import NOTHING_READ, NOTHING_WRITTEN, NextNorm, Stream
from quasar_core.kernels.triton.weights import BLOCK, TritonWeight

TILE = tl.constexpr(TILE_ROWS)
LONGEST = 2 * TILE_ROWS  # rows: two tiles
MAGIC = {torch.bfloat16: 0x43004300, torch.float16: 0x64006400}  # 128 and 1024: the last bit is worth 1


def multiply_packed(
    x: torch.Tensor,
    weight: TritonWeight,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    blocks: Blocks | None = None,
    gated: bool = False,
    behind: Stream | None = None,
    before: NextNorm | None = None,
) -> None:
    """x [T, in] · Wᵀ (+ bias [out]) (+ residual [T, out]) → out [T, out]; a row's result does not depend on T.

    `gated` stores silu(gate) · up in out [T, out ÷ 2], the first half of the outputs being gates (no residual then);
    its blocks have two stored ones, or more. Of `behind` and `before` see `stream.py`: x is then `behind.scaled`.
    """
    chosen = blocks or packed_blocks(weight, x.device, gated)
    space = scratch(x.device)
    _packed_kernel[(-(-weight.words.shape[0] // (chosen.outputs // BLOCK)), chosen.splits)](
        x,
        weight.words,
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
        MAGIC[x.dtype],
        *(behind.reads if behind else NOTHING_READ),
        *(before.writes if before else NOTHING_WRITTEN),
        BITS=weight.bits,
        MIDDLE=weight.middle,
        CHUNK=weight.chunk,
        TABLES=weight.tables,
        HAS_ZEROS=weight.has_zeros,
        STORED=chosen.outputs // BLOCK,
        SPLITS=chosen.splits,
        STEPS=-(-weight.steps // chosen.splits),
        IS_WIDE=x.shape[0] > TILE_ROWS,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        GATED=gated,
        SLOTS=triton.next_power_of_2(behind.squares.shape[1]) if behind else 0,
        NORMS=before is not None,
        num_warps=4,
        num_stages=chosen.stages,
        **overlap(),
    )


@triton.jit(do_not_specialize=["count"])  # one kernel for every T up to 8, and one for every T beyond
def _packed_kernel(
    x_ptr,
    words_ptr,
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
    magic,
    read_ptr,
    slots,
    inverse,
    eps,
    norm_ptr,
    scaled_ptr,
    written_ptr,
    BITS: tl.constexpr,
    MIDDLE: tl.constexpr,
    CHUNK: tl.constexpr,
    TABLES: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    STORED: tl.constexpr,
    SPLITS: tl.constexpr,
    STEPS: tl.constexpr,
    IS_WIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    SLOTS: tl.constexpr,
    NORMS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    block, split = tl.program_id(0), tl.program_id(1)
    chunks: tl.constexpr = 16 // BITS
    share: tl.constexpr = 16 // BITS // TABLES  # chunks whose scales are in one word
    size: tl.constexpr = 64 * STORED
    stored = outputs_of(block, stored_blocks, STORED, GATED)
    stored = tl.minimum(stored, stored_blocks - 1)  # a last block that is not whole reads what it will not write
    outputs = outputs_of(block, out_features, size, GATED)
    acc = tl.zeros((size, TILE), tl.float32)
    further = acc  # of the second tile of rows
    first = split * STEPS
    if OVERLAPS:
        _fetch_words(words_ptr, stored, first, steps, TABLES, CHUNK)
        wait(OVERLAPS)
    following = load_table(words_ptr, stored, first, steps, 0, TABLES, STORED, CHUNK)
    for step in range(first, tl.minimum(first + STEPS, steps)):
        words = load_words(words_ptr, stored, step, steps, TABLES, STORED, CHUNK)
        for i in tl.static_range(chunks):
            if i % share == 0:
                table = following  # the next is asked for now, so that the wait for it passes during this one
                following = load_table(words_ptr, stored, step, steps, i // share + 1, TABLES, STORED, CHUNK)
            scale, zero = scale_and_zero(table >> (16 * (i % share)), HAS_ZEROS, MIDDLE)
            inputs = (step * chunks + i) * CHUNK + tl.arange(0, CHUNK)
            x = _load_rows(x_ptr, inputs, 0, count, in_features)
            high, low = numbers_of(words, zero, i, magic, x, BITS)
            acc += multiply_tile(high, low, x, BITS) * scale[:, None]
            if IS_WIDE:
                x = _load_rows(x_ptr, inputs, TILE, count, in_features)
                further += multiply_tile(high, low, x, BITS) * scale[:, None]
    rows = tl.arange(0, TILE)
    if IS_WIDE:
        rows = tl.arange(0, 2 * TILE)
        acc = tl.reshape(tl.permute(tl.join(acc, further), (0, 2, 1)), (size, 2 * TILE))
    finish(
        acc, block, split, outputs, rows, out_ptr, bias_ptr, residual_ptr, partials_ptr, counters_ptr, count,
        out_features, SPLITS, HAS_BIAS, HAS_RESIDUAL, GATED, read_ptr, slots, inverse, eps, norm_ptr, scaled_ptr,
        written_ptr, SLOTS, NORMS,
    )  # fmt: skip


@triton.jit
def _load_rows(x_ptr, inputs, begin, count, in_features):
    """Eight rows of a chunk's inputs [CHUNK, 8], from the row `begin` on."""
    rows = begin + tl.arange(0, TILE)
    inside = (rows[None, :] < count) & (inputs[:, None] < in_features)
    return tl.load(x_ptr + rows[None, :] * in_features + inputs[:, None], mask=inside, other=0.0)


@triton.jit
def multiply_tile(high, low, x, BITS: tl.constexpr):
    """A chunk's sums for a tile of rows; codes of 8 bits come in two halves."""
    part = tl.zeros((high.shape[0], TILE), tl.float32)
    if BITS == 8:
        part = matrix_product(high, x, part) * 16
    return matrix_product(low, x, part)


@triton.jit
def load_table(words_ptr, stored, step, steps, number, TABLES: tl.constexpr, STORED: tl.constexpr, CHUNK: tl.constexpr):
    """The word of each output [64·STORED] that holds scales of a step; behind its last one the next step's first."""
    step = tl.minimum(step + number // TABLES, steps - 1)
    start = (stored.to(tl.int64) * steps + step) * (64 * TABLES + 32 * CHUNK) + number % TABLES * 64
    words = tl.load(words_ptr + start[:, None] + tl.arange(0, 64)[None, :])
    return tl.reshape(words, (64 * STORED,))


@triton.jit
def scale_and_zero(table, HAS_ZEROS: tl.constexpr, MIDDLE: tl.constexpr):
    """Scales (float32) and zeros (int32) of the outputs, from words that have the scale in their lower half."""
    scale = table.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    zero = table >> 16 if HAS_ZEROS else tl.zeros_like(table) + MIDDLE
    return scale, zero


@triton.jit
def load_words(words_ptr, stored, step, steps, TABLES: tl.constexpr, STORED: tl.constexpr, CHUNK: tl.constexpr):
    """The words [64·STORED, CHUNK/2] of a step, each already with the lane that multiplies by it."""
    fragments: tl.constexpr = CHUNK // 16
    start = (stored.to(tl.int64) * steps + step) * (64 * TABLES + 512 * fragments) + 64 * TABLES
    words = tl.load(words_ptr + start[:, None] + tl.arange(0, 512 * fragments)[None, :])
    words = tl.reshape(words, (STORED, fragments, 4, 8, 4, 2, 2))  # s f b g t j r
    words = tl.permute(words, (0, 2, 6, 3, 1, 4, 5))  # s b r g | f t j
    return tl.reshape(words, (64 * STORED, CHUNK // 2))


@triton.jit
def _fetch_words(words_ptr, stored, first, steps, TABLES: tl.constexpr, CHUNK: tl.constexpr):
    """Ask for the words of a program's first two steps, in lines of 128 bytes: a block's steps follow one another."""
    size: tl.constexpr = 64 * TABLES + 32 * CHUNK
    begin = stored.to(tl.int64) * steps
    lines: tl.constexpr = triton.next_power_of_2(size // 16)
    places = (begin + first)[:, None] * size + tl.arange(0, lines)[None, :] * 32
    fetch_lines(words_ptr + tl.minimum(places, ((begin + steps) * size - 1)[:, None]))


@triton.jit
def codes_of_words(shifted, MASK: tl.constexpr):
    """The codes [outputs, CHUNK] of a chunk, as whole numbers."""
    halves = tl.join(shifted & MASK, (shifted >> 16) & MASK)
    return tl.reshape(halves, (shifted.shape[0], 2 * shifted.shape[1]))


@triton.jit
def numbers_of(words, zero, i: tl.constexpr, magic, x, BITS: tl.constexpr):
    """The numbers [outputs, CHUNK] of chunk `i` of a step; of 8 bits upper and lower halves, else the same twice."""
    if BITS == 8:
        high = _numbers(words >> (8 * i + 4), zero >> 4, 15, magic, x)
        low = _numbers(words >> (8 * i), zero & 15, 15, magic, x)
    else:
        high = _numbers(words >> (BITS * i), zero, 2**BITS - 1, magic, x)
        low = high
    return high, low


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
