"""Rotation of queries and keys (with their norms, where a model has them), and the write into the cache: one launch."""

import torch
import triton
import triton.language as tl

from quasar_core.kernels.triton.language import round_to
from quasar_core.kernels.triton.overlap import overlap, wait


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
) -> None:
    """The heads of qkv [T, (H·G + 2·H)·D] → queries [T, H·G, D], and keys and values at positions of the cache.

    `keys` and `values` [H, capacity, D] are written at position + t, where `position` is an integer [1] on the device.
    Tables `cos` and `sin` [positions, D] are those of `models/rope.py` (the first half of every row of sines is
    negated), or None where a layer does not rotate; `head_norms` [H·G + H, D] are of the queries' heads, then of the
    keys'. A rotated head is x · cos + roll(x, D/2) · sin in float32, rounded once.
    """
    count, query_heads, size = queries.shape
    kv_heads, capacity, _ = keys.shape
    _rotate_kernel[(count, query_heads + 2 * kv_heads)](
        qkv,
        head_norms,
        cos,
        sin,
        position,
        keys,
        values,
        queries,
        capacity,
        eps,
        QUERY_HEADS=query_heads,
        KV_HEADS=kv_heads,
        SIZE=size,
        PADDED=triton.next_power_of_2(size),
        HAS_NORMS=head_norms is not None,
        ROTATES=cos is not None,
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
    keys_ptr,
    values_ptr,
    queries_ptr,
    capacity,
    eps,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    ROTATES: tl.constexpr,
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
        rolled = (d + SIZE // 2) % SIZE
        y = tl.load(source + rolled, mask=known, other=0.0).to(tl.float32)
        if HAS_NORMS:
            factor = tl.rsqrt(tl.sum(x * x, axis=0) / SIZE + eps)
            norms = norms_ptr + head * SIZE
            x = _normed(x, factor, norms + d, known, dtype)
            y = _normed(y, factor, norms + rolled, known, dtype)
        if ROTATES:
            cos = tl.load(cos_ptr + place * SIZE + d, mask=known, other=0.0).to(tl.float32)
            sin = tl.load(sin_ptr + place * SIZE + d, mask=known, other=0.0).to(tl.float32)
            x = x * cos + y * sin
        if head < QUERY_HEADS:
            tl.store(queries_ptr + (token * QUERY_HEADS + head) * SIZE + d, x.to(dtype), mask=known)
        else:
            kept = ((head - QUERY_HEADS) * capacity + place) * SIZE
            tl.store(keys_ptr + kept + d, x.to(dtype), mask=known)


@triton.jit
def _normed(x, factor, weight_ptrs, known, dtype: tl.constexpr):
    weight = tl.load(weight_ptrs, mask=known, other=0.0).to(tl.float32)
    return round_to(round_to(x * factor, dtype) * weight, dtype)
