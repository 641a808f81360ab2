"""Attention of a pass of a few tokens over the cache: its positions split among programs, then merged.

Flash decoding (Dao et al., 2023): each program holds a running maximum and sum for its share of the positions (Milakov
and Gimelshein, 2018, arXiv 1805.02867), and a second launch merges the shares. The query heads of a key-value head and
the tokens of the pass are rows of one product, so keys and values are read once. How many positions there are is read
from the device; the host gives only a bound. Shares end at fixed positions, so that a token's result does not depend
on how many tokens are passed with it beyond the rounding of the tensor cores' tiles. Letters: as in the package.
"""

import math

import torch
import triton
import triton.language as tl

from quasar_core.kernels.triton.blocks import multiprocessors
from quasar_core.kernels.triton.language import matrix_product, overlap, wait

MOST_SHARES = 64
_BLOCK = 64  # positions of a step


def attention_workspace(device: torch.device, tokens: int, heads: int, head_size: int) -> torch.Tensor:
    """Float32 scratch of `attend` for passes of up to `tokens` tokens."""
    return torch.empty(MOST_SHARES * tokens * heads * (head_size + 2), dtype=torch.float32, device=device)


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
    `window` of them where there is a window. `max_length` bounds position + T and sets the number of shares.
    Scores are multiplied by `scale`, 1 ÷ √D by default, and then held below a soft `cap`, where there is one. Nodes of
    a `tree`, given by depths and families int64 [T] (bit i: sees node i), stand at position + depth.
    """
    count, heads, size = queries.shape
    kv_heads, capacity, _ = keys.shape
    share, shares = _shares(min(max_length, capacity), kv_heads, queries.device)
    group, padded = heads // kv_heads, triton.next_power_of_2(size)
    rows = max(16, triton.next_power_of_2(count * group))
    depths, families = tree or (position, position)
    stats = workspace[shares * count * heads * size :]
    _attend_kernel[(kv_heads, shares)](
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
        share,
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
        share,
        count,
        heads,
        SIZE=size,
        PADDED=padded,
        SHARES=triton.next_power_of_2(shares),
        num_warps=4,
        **overlap(),
    )


def _shares(max_length: int, kv_heads: int, device: torch.device) -> tuple[int, int]:
    """Positions of a share, a multiple of the block, and the number of shares: enough to fill the device."""
    wanted = min(MOST_SHARES, max(1, 2 * multiprocessors(device) // kv_heads))
    share = -(-max_length // wanted)
    share = -(-share // _BLOCK) * _BLOCK
    return share, -(-max_length // share)


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
    share,
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
    head, index = tl.program_id(0), tl.program_id(1)
    position = tl.load(position_ptr).to(tl.int32)
    first, end = _seen(position, count, window)
    first = tl.maximum(index * share, first // BLOCK * BLOCK)
    end = tl.minimum(index * share + share, end)
    row = tl.arange(0, ROWS)
    d = tl.arange(0, PADDED)
    token, member = row // GROUP, row % GROUP
    line = token * (KV_HEADS * GROUP) + head * GROUP + member  # of queries and of the workspace
    inside = (token < count)[:, None] & (d < SIZE)[None, :]
    queries = tl.load(queries_ptr + line[:, None] * SIZE + d[None, :], mask=inside, other=0.0)
    keys = keys_ptr + head.to(tl.int64) * capacity * SIZE
    values = values_ptr + head.to(tl.int64) * capacity * SIZE
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, PADDED), tl.float32)
    if first < end:
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
    share,
    count,
    heads,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    SHARES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait(OVERLAPS)
    line = tl.program_id(0)
    first, end = _seen(tl.load(position_ptr).to(tl.int32), count, window)
    index = tl.arange(0, SHARES)
    written = (index >= first // share) & (index < (end + share - 1) // share)
    d = tl.arange(0, PADDED)
    part = index * count * heads + line
    top = tl.load(stats_ptr + 2 * part, mask=written, other=float("-inf"))
    total = tl.load(stats_ptr + 2 * part + 1, mask=written, other=0.0)
    weight = tl.exp2(top - tl.max(top, axis=0))
    mixed = tl.load(
        mixed_ptr + part[:, None] * SIZE + d[None, :], mask=written[:, None] & (d < SIZE)[None, :], other=0.0
    )
    result = tl.sum(mixed * weight[:, None], axis=0) / tl.sum(total * weight, axis=0)
    tl.store(out_ptr + line * SIZE + d, result.to(out_ptr.dtype.element_ty), mask=d < SIZE)
