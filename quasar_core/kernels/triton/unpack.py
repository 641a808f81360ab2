"""Packed codes as a weight in 16 bits, for products of many rows, such as a prompt's.

The codes are read once and the weight is written once, as numbers that the codes stand for, rounded once.
"""

import torch
import triton
import triton.language as tl

from quasar_core.kernels.triton.language import overlap, wait
from quasar_core.kernels.triton.packed import codes_of_words, load_table, load_words, scale_and_zero
from quasar_core.kernels.triton.weights import TritonWeight


def dequantize_packed(weight: TritonWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] that the codes stand for; computed in float32, then rounded to a 16-bit `dtype`."""
    out = torch.empty(weight.out_features, weight.in_features, dtype=dtype, device=weight.words.device)
    _unpack_kernel[(weight.words.shape[0], weight.steps)](
        weight.words,
        out,
        weight.in_features,
        weight.out_features,
        weight.steps,
        BITS=weight.bits,
        MIDDLE=weight.middle,
        CHUNK=weight.chunk,
        TABLES=weight.tables,
        HAS_ZEROS=weight.has_zeros,
        num_warps=4,
        **overlap(),
    )
    return out


@triton.jit
def _unpack_kernel(
    words_ptr,
    out_ptr,
    in_features,
    out_features,
    steps,
    BITS: tl.constexpr,
    MIDDLE: tl.constexpr,
    CHUNK: tl.constexpr,
    TABLES: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait(OVERLAPS)
    block, step = tl.program_id(0), tl.program_id(1)
    chunks: tl.constexpr = 16 // BITS
    share: tl.constexpr = 16 // BITS // TABLES  # chunks whose scales are in one word
    outputs = block * 64 + tl.arange(0, 64)
    stored = block + tl.arange(0, 1)
    words = load_words(words_ptr, stored, step, steps, TABLES, 1, CHUNK)
    for i in tl.static_range(chunks):
        chunk = step * chunks + i
        table = load_table(words_ptr, stored, step, steps, i // share, TABLES, 1, CHUNK)
        scale, zero = scale_and_zero(table >> (16 * (i % share)), HAS_ZEROS, MIDDLE)
        codes = codes_of_words(words >> (BITS * i), 2**BITS - 1)
        inputs = chunk * CHUNK + tl.arange(0, CHUNK)
        inside = (outputs[:, None] < out_features) & (inputs[None, :] < in_features)
        places = outputs[:, None].to(tl.int64) * in_features + inputs[None, :]
        numbers = (codes - zero[:, None]).to(tl.float32) * scale[:, None]
        tl.store(out_ptr + places, numbers.to(out_ptr.dtype.element_ty), mask=inside)
