"""Attention of a pass of a few tokens over the cache: its positions split among programs, then merged.

Flash decoding (Dao et al., 2023): each program holds a running maximum and sum for its share of the positions (Milakov
and Gimelshein, 2018, arXiv 1805.02867), and a second launch merges the shares. The query heads of a key-value head and
the tokens of the pass are rows of one product, so keys and values are read once. How many positions there are is read
from the device, and with it which program takes which shares, so that one launch serves every length of a cache. A
token's result is the same to the last bit whatever tokens are passed with it: shares begin and end at positions that
never move, sums over them are taken in order, and every product has the same tile. What a token does not see adds
zeros. Two launches less are possible: the program that has a share may norm and rotate its queries itself, and write
the new keys and values that lie in it before it reads them; and the last program of a head may merge its shares, where
these are few. Letters: as in the package.
"""

import math

import torch
import triton
import triton.language as tl

from quasar_core.kernels.triton.blocks import multiprocessors
from quasar_core.kernels.triton.language import matrix_product, overlap, scratch, wait
from quasar_core.kernels.triton.rotation import Rotation, turned
from quasar_core.kernels.triton.shares import begin_of, count_shares, merge, seen_by, share_of

_BLOCK = 64  # positions of a step
_ROWS = 64  # of a tile at least: with fewer, a Hopper GPU would multiply in other units, whose last bits may differ
_MERGED = 16  # shares that are read at once
_LINES = 4  # of queries that a program of attention merges at once
_PROGRAMS = 2  # of a multiprocessor: so many fit
MOST_NODES = tl.constexpr(16)  # of a tree
LONGEST_WRITE = tl.constexpr(16)  # tokens whose keys and values one launch writes


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
    rotation: Rotation | None = None,
    merges: bool = False,
) -> None:
    """queries [T, H·G, D] over keys and values [H, capacity, D] → out [T, H·G·D].

    Token t, at position + t (`position`: an integer [1] on the device), sees the positions up to its own, the last
    `window` of them where there is a window. `max_length` bounds position + T, as the cache's capacity does.
    Scores are multiplied by `scale`, 1 ÷ √D by default, and then held below a soft `cap`, where there is one. Nodes of
    a `tree`, at most 16, given by depths and families int64 [T] (bit i: sees node i), stand at position + depth.

    With a `rotation`, queries are the product qkv [T, (H·G + 2·H)·D] of at most 16 tokens: its queries and keys are
    normed and rotated, its keys and values written, as by `rotate_and_store`; or they are [T, H·G·D], and nothing is
    written. With `merges` the last program of a head adds its shares, and there is one launch.
    """
    (kv_heads, capacity, size), (count, width) = keys.shape, out.shape
    group, heads = width // size // kv_heads, width // size
    shares = count_shares(min(max_length, capacity))
    padded = triton.next_power_of_2(size)
    rows = max(_ROWS, triton.next_power_of_2(count * group))
    depths, families = tree or (position, position)
    programs = max(_PROGRAMS * multiprocessors(queries.device) // kv_heads, 1)
    stats = workspace[shares * count * heads * size :]
    stride = queries.numel() // count
    turn = rotation or Rotation(None, None, None, 0.0)
    _attend_kernel[(kv_heads, min(shares, programs))](
        queries,
        keys,
        values,
        position,
        depths,
        families,
        *turn.tensors,
        workspace,
        stats,
        scratch(queries.device).counters if merges else None,
        out,
        stride,
        capacity,
        window or 0,
        count,
        (scale or 1 / math.sqrt(size)) * (1 if cap else math.log2(math.e)),
        cap or 0.0,
        turn.eps,
        GROUP=group,
        KV_HEADS=kv_heads,
        SIZE=size,
        PADDED=padded,
        ROWS=rows,
        BLOCK=_BLOCK,
        CAPPED=cap is not None,
        IS_TREE=tree is not None,
        TURNS=rotation is not None,
        WRITES=rotation is not None and stride > width,
        MERGED=_MERGED if merges else 0,
        LINES=_LINES,
        **turn.constants(size),
        num_warps=4 if rows * padded <= 64 * 128 else 8,  # more sums than four warps have registers for
        num_stages=3 if rows * padded <= 64 * 128 else 2,
        **overlap(),
    )
    if merges:
        return
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
    norms_ptr,
    cos_ptr,
    sin_ptr,
    mixed_ptr,
    stats_ptr,
    counters_ptr,
    out_ptr,
    stride,
    capacity,
    window,
    count,
    scale,
    cap,
    eps,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPPED: tl.constexpr,
    IS_TREE: tl.constexpr,
    TURNS: tl.constexpr,
    WRITES: tl.constexpr,
    MERGED: tl.constexpr,
    LINES: tl.constexpr,
    CHANNELS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    NORMS_LAST: tl.constexpr,
    ROTATES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait(OVERLAPS)
    head = tl.program_id(0)
    position = tl.load(position_ptr).to(tl.int32)
    least, most = seen_by(position, count, window)
    row = tl.arange(0, ROWS)
    d = tl.arange(0, PADDED)
    token, member = row // GROUP, row % GROUP
    line = token * (KV_HEADS * GROUP) + head * GROUP + member  # of queries and of the workspace
    inside = (token < count)[:, None] & (d < SIZE)[None, :]
    source = queries_ptr + token * stride + (head * GROUP + member) * SIZE
    if TURNS:
        turn = position + _steps_behind(token, count, depths_ptr, IS_TREE)
        queries = turned(
            source, head * GROUP + member, turn, inside, norms_ptr, cos_ptr, sin_ptr, eps, queries_ptr.dtype.element_ty,
            SIZE, PADDED, CHANNELS, INTERLEAVED, HAS_NORMS, NORMS_LAST, ROTATES,
        )  # fmt: skip
    else:
        queries = tl.load(source[:, None] + d[None, :], mask=inside, other=0.0)
    if IS_TREE:
        family = _family_in_window(token, count, window, depths_ptr, families_ptr)
        own = position + _steps_behind(token, count, depths_ptr, True)
        gone = tl.where(window > 0, own - window, -1)  # the last position that has left a token's window
    keys = keys_ptr + head.to(tl.int64) * capacity * SIZE
    values = values_ptr + head.to(tl.int64) * capacity * SIZE
    for index in range(share_of(least) + tl.program_id(1), share_of(most - 1) + 1, tl.num_programs(1)):
        first = tl.maximum(begin_of(index), least // BLOCK * BLOCK)
        end = tl.minimum(begin_of(index + 1), most)
        if WRITES:
            _write_new(
                first, end, head, position, count, queries_ptr, stride, keys, values, depths_ptr, norms_ptr, cos_ptr,
                sin_ptr, eps, GROUP * KV_HEADS, KV_HEADS, SIZE, PADDED, IS_TREE, CHANNELS, INTERLEAVED, HAS_NORMS,
                NORMS_LAST, ROTATES,
            )  # fmt: skip
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
                hidden = _hidden_in_tree(seen, end, position, family, gone)
            else:
                own = position + token[:, None]
                hidden = (seen[None, :] > own) | ((window > 0) & (seen[None, :] <= own - window))
                hidden = hidden | (seen >= end)[None, :]
            scores = tl.where(hidden, float("-inf"), scores)
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
    if MERGED:
        _merge_at_last(
            head, position, count, window, mixed_ptr, stats_ptr, counters_ptr, out_ptr, GROUP, KV_HEADS, SIZE, PADDED,
            MERGED, LINES,
        )  # fmt: skip


@triton.jit
def _merge_at_last(
    head,
    position,
    count,
    window,
    mixed_ptr,
    stats_ptr,
    counters_ptr,
    out_ptr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    MERGED: tl.constexpr,
    LINES: tl.constexpr,
):
    """The last program to arrive at a head merges its shares, in order, whoever it is; the counter is zero again."""
    tl.debug_barrier()  # all threads have stored before one of them says so
    arrived = tl.atomic_add(counters_ptr + head, 1, sem="acq_rel")
    if arrived == tl.num_programs(1) - 1:
        least, most = seen_by(position, count, window)
        first, last = share_of(least), share_of(most - 1) + 1
        for begin in range(0, count * GROUP, LINES):
            row = begin + tl.arange(0, LINES)
            line = row // GROUP * (KV_HEADS * GROUP) + head * GROUP + row % GROUP
            known = row < count * GROUP
            merge(
                line, known, first, last, mixed_ptr, stats_ptr, out_ptr, count, KV_HEADS * GROUP, SIZE, PADDED, MERGED
            )
        tl.store(counters_ptr + head, 0)


@triton.jit
def _steps_behind(token, count, depths_ptr, IS_TREE: tl.constexpr):
    """How far behind the pass's position tokens stand: their number, or of a tree's nodes their depth."""
    if IS_TREE:
        token = tl.load(depths_ptr + token, mask=token < count, other=0).to(tl.int32)
    return token


@triton.jit
def _write_new(
    first,
    end,
    head,
    position,
    count,
    qkv_ptr,
    stride,
    keys,
    values,
    depths_ptr,
    norms_ptr,
    cos_ptr,
    sin_ptr,
    eps,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    IS_TREE: tl.constexpr,
    CHANNELS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    NORMS_LAST: tl.constexpr,
    ROTATES: tl.constexpr,
):
    """Write those of the pass's keys and values whose places are from `first` up to `end`; then all threads see them.

    Another program has the other places, and reads nothing of these.
    """
    if end > position:
        token, d = tl.arange(0, LONGEST_WRITE), tl.arange(0, PADDED)
        place = position + token
        known = ((token < count) & (place >= first) & (place < end))[:, None] & (d < SIZE)[None, :]
        source = qkv_ptr + token * stride + (QUERY_HEADS + head) * SIZE
        norm = token * 0 + QUERY_HEADS + head
        turn = position + _steps_behind(token, count, depths_ptr, IS_TREE)
        key = turned(
            source, norm, turn, known, norms_ptr, cos_ptr, sin_ptr, eps, keys.dtype.element_ty,
            SIZE, PADDED, CHANNELS, INTERLEAVED, HAS_NORMS, NORMS_LAST, ROTATES,
        )  # fmt: skip
        kept = place[:, None] * SIZE + d[None, :]
        tl.store(keys + kept, key, mask=known)
        value = tl.load(source[:, None] + KV_HEADS * SIZE + d[None, :], mask=known, other=0.0)
        tl.store(values + kept, value, mask=known)
        tl.debug_barrier()


@triton.jit
def _family_in_window(token, count, window, depths_ptr, families_ptr):
    """The int32 bits of each token: of the nodes that it sees, and the sign's for the text before the tree."""
    node = tl.arange(0, MOST_NODES)
    depth = tl.load(depths_ptr + node, mask=node < count, other=0).to(tl.int32)
    behind = _steps_behind(token, count, depths_ptr, True)[:, None] - depth[None, :]
    near = ((window <= 0) | (behind < window)).to(tl.int32)
    family = tl.load(families_ptr + token, mask=token < count, other=0).to(tl.int32)
    return (family & tl.sum(near << node[None, :], axis=1)) | -2147483648


@triton.jit
def _hidden_in_tree(seen, end, position, family, gone):
    """The positions that each row of a family does not see in its window: all up to `gone`, and from `end` on.

    A node's number is no less than its depth, so that none up to `gone` is near enough. No node has the bit before the
    sign's.
    """
    node = seen - position
    bit = tl.where(seen >= end, 30, tl.where(node >= 0, node, 31))
    return (((family[:, None] >> bit[None, :]) & 1) == 0) | (seen[None, :] <= gone[:, None])


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
    line = tl.program_id(0) + tl.zeros((1,), tl.int32)
    first, end = seen_by(tl.load(position_ptr).to(tl.int32), count, window)
    first, last = share_of(first), share_of(end - 1) + 1
    merge(line, line >= 0, first, last, mixed_ptr, stats_ptr, out_ptr, count, heads, SIZE, PADDED, MERGED)
