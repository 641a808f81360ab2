"""The rotary embedding of queries and keys, with norms of heads where a model has them, and the write to the cache.

It is a launch of its own, or attention's first step (`attention.py`). Letters: as in the package, R rows of a tile.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from quasar_core.kernels.triton.language import overlap, round_to, wait


@dataclass(frozen=True)
class Rotation:
    """What is done to the heads of queries and keys.

    Norms [H·G + H, D] are of the queries' heads, then of the keys', before the rotation or, with `norms_last`, after
    it. Tables `cos` and `sin` [positions, D] are those of `models/rope.py` (the first half of every row of sines is
    negated), or None where a layer does not rotate. A rotated head is x · cos + x' · sin in float32, rounded once; x'
    are the partners of the first `channels` (0: all), half of these apart or, interleaved, one.
    """

    norms: torch.Tensor | None
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    eps: float
    channels: int = 0
    interleaved: bool = False
    norms_last: bool = False

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Norms and tables as the kernels take them."""
        return self.norms, self.cos, self.sin

    def constants(self, size: int) -> dict[str, Any]:
        """What the kernels are compiled for, of heads of that size."""
        return {
            "CHANNELS": self.channels or size,
            "INTERLEAVED": self.interleaved,
            "HAS_NORMS": self.norms is not None,
            "NORMS_LAST": self.norms_last,
            "ROTATES": self.cos is not None,
        }


def rotate_and_store(
    qkv: torch.Tensor,
    rotation: Rotation,
    position: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    queries: torch.Tensor,
    depths: torch.Tensor | None = None,
) -> None:
    """The heads of qkv [T, (H·G + 2·H)·D] → queries [T, H·G, D], and keys and values at positions of the cache.

    `keys` and `values` [H, capacity, D] are written at position + t, where `position` is an integer [1] on the device.
    Token t is rotated by position + t, or where `depths` [T] are given by position + depth.
    """
    count, query_heads, size = queries.shape
    kv_heads, capacity, _ = keys.shape
    _rotate_kernel[(count, query_heads + 2 * kv_heads)](
        qkv,
        *rotation.tensors,
        position,
        position if depths is None else depths,
        keys,
        values,
        queries,
        capacity,
        rotation.eps,
        QUERY_HEADS=query_heads,
        KV_HEADS=kv_heads,
        SIZE=size,
        PADDED=triton.next_power_of_2(size),
        IS_TREE=depths is not None,
        **rotation.constants(size),
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
    row = tl.zeros((1,), tl.int32)  # the one row of a tile
    known = (d < SIZE)[None, :] & (row == 0)[:, None]
    source = qkv_ptr + (token * (QUERY_HEADS + 2 * KV_HEADS) + head) * SIZE
    dtype: tl.constexpr = queries_ptr.dtype.element_ty
    if head >= QUERY_HEADS + KV_HEADS:
        kept = ((head - QUERY_HEADS - KV_HEADS) * capacity + place) * SIZE
        tl.store(values_ptr + kept + d[None, :], tl.load(source + d[None, :], mask=known), mask=known)
    else:
        turn = place
        if IS_TREE:
            turn = place - token + tl.load(depths_ptr + token)
        x = turned(
            source + row, head + row, turn + row, known, norms_ptr, cos_ptr, sin_ptr, eps, dtype, SIZE, PADDED,
            CHANNELS, INTERLEAVED, HAS_NORMS, NORMS_LAST, ROTATES,
        )  # fmt: skip
        if head < QUERY_HEADS:
            tl.store(queries_ptr + (token * QUERY_HEADS + head) * SIZE + d[None, :], x, mask=known)
        else:
            kept = ((head - QUERY_HEADS) * capacity + place) * SIZE
            tl.store(keys_ptr + kept + d[None, :], x, mask=known)


@triton.jit
def turned(
    source,  # [R] pointers to the first number of each row's head
    head,  # [R] which head's norm it is
    turn,  # [R] positions by which it is rotated
    known,  # [R, PADDED] what there is
    norms_ptr,
    cos_ptr,
    sin_ptr,
    eps,
    dtype: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    CHANNELS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    NORMS_LAST: tl.constexpr,
    ROTATES: tl.constexpr,
):
    """Heads, normed and rotated → [R, PADDED] of `dtype`."""
    d = tl.arange(0, PADDED)
    rolled = d ^ 1 if INTERLEAVED else (d + CHANNELS // 2) % CHANNELS
    rolled = tl.where(d < CHANNELS, rolled, d)
    x = tl.load(source[:, None] + d[None, :], mask=known, other=0.0).to(tl.float32)
    y = tl.load(source[:, None] + rolled[None, :], mask=known, other=0.0).to(tl.float32)
    norms = norms_ptr
    if HAS_NORMS:
        norms = norms_ptr + head[:, None] * SIZE
        if not NORMS_LAST:
            factor = tl.rsqrt(tl.sum(x * x, axis=1) / SIZE + eps)[:, None]
            x = _normed(x, factor, norms + d[None, :], known, dtype)
            y = _normed(y, factor, norms + rolled[None, :], known, dtype)
    if ROTATES:
        places = turn[:, None] * SIZE + d[None, :]
        cos = tl.load(cos_ptr + places, mask=known, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + places, mask=known, other=0.0).to(tl.float32)
        x = x * cos + y * sin
    if HAS_NORMS and NORMS_LAST:
        x = round_to(x, dtype)
        factor = tl.rsqrt(tl.sum(x * x, axis=1) / SIZE + eps)[:, None]
        x = _normed(x, factor, norms + d[None, :], known, dtype)
    return x.to(dtype)


@triton.jit
def _normed(x, factor, weight_ptrs, known, dtype: tl.constexpr):
    weight = tl.load(weight_ptrs, mask=known, other=0.0)
    return round_to(round_to(x * factor, weight.dtype) * weight.to(tl.float32), dtype)
