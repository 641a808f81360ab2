"""Attention of a pass of a few tokens over the cache: its positions split among programs, then merged.

Flash decoding (Dao et al., 2023): each program holds a running maximum and sum for its share of the positions (Milakov
and Gimelshein, 2018, arXiv 1805.02867), and a second launch merges the shares. The query heads of a key-value head and
the tokens of the pass are rows of one product, so keys and values are read once. How many positions there are is read
from the device, and with it which program takes which shares, so that one launch serves every length of a cache. A
token's result is the same to the last bit whatever tokens are passed with it: shares begin and end at positions that
never move, sums over them are taken in order, and every product has the same tile. What a token does not see adds
zeros. Letters: as in the package.
"""

import math

import torch
import triton
import triton.language as tl

from quasar_core.kernels.triton.blocks import multiprocessors
from quasar_core.kernels.triton.language import matrix_product, overlap, wait

_BLOCK = 64  # positions of a step
_ROWS = 64  # of a tile at least: with fewer, a Hopper GPU would multiply in other units, whose last bits may differ
_MERGED = 16  # shares that are added at once
_PROGRAMS = 2  # of a multiprocessor: so many fit


@triton.jit
def share_of(position):
    """The number of the share that holds a position: short shares where texts are, long ones behind that.

    So a short text keeps many programs busy, and a long one does not make more parts than are merged in passing.
    """
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


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    window: int | None,
    workspace: torch.Tensor,
    out: torch.Tensor,
    max_length: int,
    scale: float | None = None,
    cap: float | None = None,
    tree: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """queries [T, H·G, D] over keys and values [H, capacity, D] → out [T, H·G·D].

    Token t, at position + t (`position`: an integer [1] on the device), sees the positions up to its own, the last
    `window` of them where there is a window. `max_length` bounds position + T, as the cache's capacity does.
    Scores are multiplied by `scale`, 1 ÷ √D by default, and then held below a soft `cap`, where there is one. Nodes of
    a `tree`, given by depths and families int64 [T] (bit i: sees node i), stand at position + depth.
    """
    count, heads, size = queries.shape
    kv_heads, capacity, _ = keys.shape
    shares = count_shares(min(max_length, capacity))
    group, padded = heads // kv_heads, triton.next_power_of_2(size)
    rows = max(_ROWS, triton.next_power_of_2(count * group))
    depths, families = tree or (position, position)
    programs = max(_PROGRAMS * multiprocessors(queries.device) // kv_heads, 1)
    stats = workspace[shares * count * heads * size :]
    _attend_kernel[(kv_heads, min(shares, programs))](
        queries,
        keys,
        values,
        position,
        depths,
        families,
        workspace,
        stats,
        capacity,
        window or 0,
        count,
        (scale or 1 / math.sqrt(size)) * (1 if cap else math.log2(math.e)),
        cap or 0.0,
        GROUP=group,
        KV_HEADS=kv_heads,
        SIZE=size,
        PADDED=padded,
        ROWS=rows,
        BLOCK=_BLOCK,
        CAPPED=cap is not None,
        IS_TREE=tree is not None,
        num_warps=4 if rows * padded <= 64 * 128 else 8,  # more sums than four warps have registers for
        num_stages=3 if rows * padded <= 64 * 128 else 2,
        **overlap(),
    )
    _merge_kernel[(count * heads,)](
        workspace,
        stats,
        position,
        out,
        window or 0,
        count,
        heads,
        SIZE=size,
        PADDED=padded,
        MERGED=_MERGED,
        num_warps=4,
        **overlap(),
    )


@triton.jit(do_not_specialize=["count"])  # one kernel for every T
def _attend_kernel(
    queries_ptr,
    keys_ptr,
    values_ptr,
    position_ptr,
    depths_ptr,
    families_ptr,
    mixed_ptr,
    stats_ptr,
    capacity,
    window,
    count,
    scale,
    cap,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPPED: tl.constexpr,
    IS_TREE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait(OVERLAPS)
    head = tl.program_id(0)
    position = tl.load(position_ptr).to(tl.int32)
    least, most = _seen(position, count, window)
    row = tl.arange(0, ROWS)
    d = tl.arange(0, PADDED)
    token, member = row // GROUP, row % GROUP
    line = token * (KV_HEADS * GROUP) + head * GROUP + member  # of queries and of the workspace
    inside = (token < count)[:, None] & (d < SIZE)[None, :]
    queries = tl.load(queries_ptr + line[:, None] * SIZE + d[None, :], mask=inside, other=0.0)
    keys = keys_ptr + head.to(tl.int64) * capacity * SIZE
    values = values_ptr + head.to(tl.int64) * capacity * SIZE
    for index in range(share_of(least) + tl.program_id(1), share_of(most - 1) + 1, tl.num_programs(1)):
        first = tl.maximum(begin_of(index), least // BLOCK * BLOCK)
        end = tl.minimum(begin_of(index + 1), most)
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, PADDED), tl.float32)
        for start in range(first, end, BLOCK):
            seen = start + tl.arange(0, BLOCK)
            places = seen[:, None] * SIZE + d[None, :]
            known = (seen < end)[:, None] & (d < SIZE)[None, :]
            key = tl.load(keys + places, mask=known, other=0.0)
            scores = matrix_product(queries, tl.trans(key), tl.zeros((ROWS, BLOCK), tl.float32)) * scale
            if CAPPED:  # cap · tanh(score ÷ cap), in powers of 2
                scores = cap * 1.4426950408889634 * (2 / (1 + tl.exp(-2 * scores / cap)) - 1)
            if IS_TREE:
                hidden = _hidden_in_tree(seen, token, position, count, window, depths_ptr, families_ptr)
            else:
                own = position + token[:, None]
                hidden = (seen[None, :] > own) | ((window > 0) & (seen[None, :] <= own - window))
            scores = tl.where(hidden | (seen >= end)[None, :], float("-inf"), scores)
            higher = tl.maximum(top, tl.max(scores, axis=1))
            finite = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores - finite[:, None])
            fading = tl.exp2(top - finite)
            value = tl.load(values + places, mask=known, other=0.0)
            acc = matrix_product(weights.to(value.dtype), value, acc * fading[:, None])
            total = total * fading + tl.sum(weights, axis=1)
            top = higher
        part = index * count * (KV_HEADS * GROUP) + line
        tl.store(mixed_ptr + part[:, None] * SIZE + d[None, :], acc, mask=inside)
        tl.store(stats_ptr + 2 * part, top, mask=token < count)
        tl.store(stats_ptr + 2 * part + 1, total, mask=token < count)


@triton.jit
def _hidden_in_tree(seen, token, position, count, window, depths_ptr, families_ptr):
    """Of each row of tokens the positions that its node does not see."""
    node = seen - position
    is_node = (node >= 0) & (node < count)
    family = tl.load(families_ptr + token, mask=token < count, other=0)
    member = (family[:, None] >> tl.where(is_node, node, 0).to(tl.int64)[None, :]) & 1
    depth = tl.load(depths_ptr + node, mask=is_node, other=0).to(tl.int32)
    place = tl.where(is_node, position + depth, seen)
    own = position + tl.load(depths_ptr + token, mask=token < count, other=0).to(tl.int32)
    hidden = (node >= 0)[None, :] & ((member == 0) | (node >= count)[None, :])
    return hidden | ((window > 0) & (place[None, :] <= own[:, None] - window))


@triton.jit
def _seen(position, count, window):
    """From which position, and up to which, the tokens of a pass see anything."""
    return tl.where(window > 0, tl.maximum(position - window + 1, 0), 0), position + count


@triton.jit(do_not_specialize=["count"])  # one kernel for every T
def _merge_kernel(
    mixed_ptr,
    stats_ptr,
    position_ptr,
    out_ptr,
    window,
    count,
    heads,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    MERGED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait(OVERLAPS)
    line = tl.program_id(0)
    first, end = _seen(tl.load(position_ptr).to(tl.int32), count, window)
    first, end = share_of(first), share_of(end - 1) + 1
    start = first // MERGED * MERGED  # so that the shares that are added at once are always the same ones
    index = tl.arange(0, MERGED)
    highest = tl.full((MERGED,), float("-inf"), tl.float32)
    for begin in range(start, end, MERGED):
        written = (begin + index >= first) & (begin + index < end)
        part = (begin + index) * count * heads + line
        highest = tl.maximum(highest, tl.load(stats_ptr + 2 * part, mask=written, other=float("-inf")))
    top = tl.max(highest, axis=0)
    d = tl.arange(0, PADDED)
    mixed, total = tl.zeros((PADDED,), tl.float32), tl.zeros((MERGED,), tl.float32)
    for begin in range(start, end, MERGED):
        written = (begin + index >= first) & (begin + index < end)
        part = (begin + index) * count * heads + line
        weight = tl.exp2(tl.load(stats_ptr + 2 * part, mask=written, other=float("-inf")) - top)
        total += weight * tl.load(stats_ptr + 2 * part + 1, mask=written, other=0.0)
        inside = written[:, None] & (d < SIZE)[None, :]
        share = tl.load(mixed_ptr + part[:, None] * SIZE + d[None, :], mask=inside, other=0.0)
        mixed += tl.sum(share * weight[:, None], axis=0)
    result = mixed / tl.sum(total, axis=0)
    tl.store(out_ptr + line * SIZE + d, result.to(out_ptr.dtype.element_ty), mask=d < SIZE)
