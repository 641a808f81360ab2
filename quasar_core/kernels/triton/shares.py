"""The shares of a cache's positions that programs of attention take, and how their sums become one.

Short shares lie where texts are, long ones behind that: a short text keeps many programs busy, and a long one does not
make more parts than are merged in passing. They begin and end at positions that never move.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def share_of(position):
    """The number of the share that holds a position."""
    share = min(position, 1024) // 64
    share += min(max(position - 1024, 0), 3072) // 128
    share += min(max(position - 4096, 0), 12288) // 512
    share += min(max(position - 16384, 0), 49152) // 1024
    return share + max(position - 65536, 0) // 4096


@triton.jit
def begin_of(share):
    """The first position of a share."""
    begin = min(share, 16) * 64
    begin += min(max(share - 16, 0), 24) * 128
    begin += min(max(share - 40, 0), 24) * 512
    begin += min(max(share - 64, 0), 48) * 1024
    return begin + max(share - 112, 0) * 4096


def count_shares(length: int) -> int:
    """Shares that so many positions lie in, one at least."""
    return int(share_of.fn(length - 1)) + 1


def attention_workspace(device: torch.device, tokens: int, heads: int, head_size: int, max_length: int) -> torch.Tensor:
    """Float32 scratch of `attend` for passes of up to `tokens` tokens over so many positions."""
    size = count_shares(max_length) * tokens * heads * (head_size + 2)
    return torch.empty(size, dtype=torch.float32, device=device)


@triton.jit
def seen_by(position, count, window):
    """From which position, and up to which, the tokens of a pass see anything."""
    return tl.where(window > 0, tl.maximum(position - window + 1, 0), 0), position + count


@triton.jit
def merge(
    line,  # [LINES] of queries
    known,  # [LINES] which of them there are
    first,
    last,
    mixed_ptr,
    stats_ptr,
    out_ptr,
    count,
    heads,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    MERGED: tl.constexpr,
):
    """Add the shares from `first` up to `last` of some lines one after the other, so that no layout changes a sum.

    Several are asked for at once; of shares that do not exist, a weight of zero is added.
    """
    d = tl.arange(0, PADDED)
    inside = known[:, None] & (d < SIZE)[None, :]
    top = tl.full(line.shape, float("-inf"), tl.float32)
    total = tl.zeros(line.shape, tl.float32)
    mixed = tl.zeros((line.shape[0], PADDED), tl.float32)
    for begin in range(first // MERGED * MERGED, last, MERGED):  # so that they are always the same ones
        index = begin + tl.arange(0, MERGED)
        written = known[:, None] & ((index >= first) & (index < last))[None, :]
        parts = index[None, :] * count * heads + line[:, None]
        highest = tl.load(stats_ptr + 2 * parts, mask=written, other=float("-inf"), cache_modifier=".cg")
        higher = tl.maximum(top, tl.max(highest, axis=1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        fading = tl.exp2(top - finite)
        total, mixed, top = total * fading, mixed * fading[:, None], higher
        for i in tl.static_range(MERGED):
            there = (begin + i >= first) & (begin + i < last)
            part = (begin + i) * count * heads + line
            own = tl.load(stats_ptr + 2 * part, mask=known & there, other=float("-inf"), cache_modifier=".cg")
            sums = tl.load(stats_ptr + 2 * part + 1, mask=known & there, other=0.0, cache_modifier=".cg")
            share = tl.load(
                mixed_ptr + part[:, None] * SIZE + d[None, :], mask=inside & there, other=0.0, cache_modifier=".cg"
            )
            weight = tl.exp2(own - finite)
            total += weight * sums
            mixed += weight[:, None] * share
    result = mixed / tl.where(known, total, 1.0)[:, None]
    tl.store(out_ptr + line[:, None] * SIZE + d[None, :], result.to(out_ptr.dtype.element_ty), mask=inside)
