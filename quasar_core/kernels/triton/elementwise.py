"""The kernels between products: RMS norm with the residual sum (arXiv 1910.07467), the MLP's gate, rotary embedding.

Each is one launch; the rotary kernel also norms queries and keys, where a model does, and writes the KV cache.
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
    """The same as `eight_bit.quantize_rows` makes it: codes [T, I] int8 or float8_e4m3fn, and scales [T] float32."""
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


def rotate_and_store(
    qkv: torch.Tensor,
    head_norms: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    position: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    queries: torch.Tensor,
    eps: float,
    channels: int = 0,
    interleaved: bool = False,
    norms_last: bool = False,
    depths: torch.Tensor | None = None,
) -> None:
    """The heads of qkv [T, (H·G + 2·H)·D] → queries [T, H·G, D], and keys and values at positions of the cache.

    `keys` and `values` [H, capacity, D] are written at position + t, where `position` is an integer [1] on the device.
    Tables `cos` and `sin` [positions, D] are those of `models/rope.py` (the first half of every row of sines is
    negated), or None where a layer does not rotate; `head_norms` [H·G + H, D] are of the queries' heads, then of the
    keys', before the rotation or, with `norms_last`, after it. A rotated head is x · cos + x' · sin in float32, rounded
    once; x' are the partners of the first `channels` (0: all), half of these apart or, interleaved, one. Token t is
    rotated by position + t, or where `depths` [T] are given by position + depth.
    """
    count, query_heads, size = queries.shape
    kv_heads, capacity, _ = keys.shape
    _rotate_kernel[(count, query_heads + 2 * kv_heads)](
        qkv,
        head_norms,
        cos,
        sin,
        position,
        position if depths is None else depths,
        keys,
        values,
        queries,
        capacity,
        eps,
        QUERY_HEADS=query_heads,
        KV_HEADS=kv_heads,
        SIZE=size,
        PADDED=triton.next_power_of_2(size),
        CHANNELS=channels or size,
        INTERLEAVED=interleaved,
        HAS_NORMS=head_norms is not None,
        NORMS_LAST=norms_last,
        ROTATES=cos is not None,
        IS_TREE=depths is not None,
        num_warps=1,
        **overlap(),
    )


@triton.jit
def _rotate_kernel(
    qkv_ptr,
    norms_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    depths_ptr,
    keys_ptr,
    values_ptr,
    queries_ptr,
    capacity,
    eps,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    CHANNELS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    NORMS_LAST: tl.constexpr,
    ROTATES: tl.constexpr,
    IS_TREE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait(OVERLAPS)
    token, head = tl.program_id(0), tl.program_id(1)
    place = tl.load(position_ptr).to(tl.int64) + token
    d = tl.arange(0, PADDED)
    known = d < SIZE
    source = qkv_ptr + (token * (QUERY_HEADS + 2 * KV_HEADS) + head) * SIZE
    dtype: tl.constexpr = queries_ptr.dtype.element_ty
    x = tl.load(source + d, mask=known, other=0.0).to(tl.float32)
    if head >= QUERY_HEADS + KV_HEADS:
        kept = ((head - QUERY_HEADS - KV_HEADS) * capacity + place) * SIZE
        tl.store(values_ptr + kept + d, x.to(dtype), mask=known)
    else:
        rolled = d ^ 1 if INTERLEAVED else (d + CHANNELS // 2) % CHANNELS
        rolled = tl.where(d < CHANNELS, rolled, d)
        y = tl.load(source + rolled, mask=known, other=0.0).to(tl.float32)
        if HAS_NORMS and not NORMS_LAST:
            norms = norms_ptr + head * SIZE
            factor = tl.rsqrt(tl.sum(x * x, axis=0) / SIZE + eps)
            x = _normed(x, factor, norms + d, known, dtype)
            y = _normed(y, factor, norms + rolled, known, dtype)
        if ROTATES:
            turn = place
            if IS_TREE:
                turn = place - token + tl.load(depths_ptr + token)
            cos = tl.load(cos_ptr + turn * SIZE + d, mask=known, other=0.0).to(tl.float32)
            sin = tl.load(sin_ptr + turn * SIZE + d, mask=known, other=0.0).to(tl.float32)
            x = x * cos + y * sin
        if HAS_NORMS and NORMS_LAST:
            x = round_to(x, dtype)
            factor = tl.rsqrt(tl.sum(x * x, axis=0) / SIZE + eps)
            x = _normed(x, factor, norms_ptr + head * SIZE + d, known, dtype)
        if head < QUERY_HEADS:
            tl.store(queries_ptr + (token * QUERY_HEADS + head) * SIZE + d, x.to(dtype), mask=known)
        else:
            kept = ((head - QUERY_HEADS) * capacity + place) * SIZE
            tl.store(keys_ptr + kept + d, x.to(dtype), mask=known)


@triton.jit
def _normed(x, factor, weight_ptrs, known, dtype: tl.constexpr):
    weight = tl.load(weight_ptrs, mask=known, other=0.0)
    return round_to(round_to(x * factor, weight.dtype) * weight.to(tl.float32), dtype)
