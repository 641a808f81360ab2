"""The greedy choice of each row of logits and its margin, its likeliest tokens, and how many drafts are confirmed."""

import torch
import triton
import triton.language as tl

from quasar_core.kernels.triton.language import scratch

_BLOCK = 2048
_NONE = tl.constexpr(2147483647)  # no index


def argmax_and_margin(logits: torch.Tensor, tokens: torch.Tensor, best: torch.Tensor, second: torch.Tensor) -> None:
    """logits [T, V] → tokens int64 [T], and the greatest and second greatest logits float32 [T].

    Among equals the first wins, and NaN is greater than all, as `torch.argmax` and `torch.topk` have it. The token is
    −1 where the greatest is not a finite number.
    """
    count, vocabulary = logits.shape
    blocks = triton.cdiv(vocabulary, _BLOCK)
    found = scratch(logits.device).partials[: 3 * count * blocks].view(3, count, blocks)
    _block_kernel[(count, blocks)](
        logits, found[0], found[1], found[2].view(torch.int32), vocabulary, BLOCK=_BLOCK, num_warps=4
    )
    _merge_kernel[(count,)](
        found[0],
        found[1],
        found[2].view(torch.int32),
        tokens,
        best,
        second,
        blocks,
        BLOCKS=triton.next_power_of_2(blocks),
        num_warps=1,
    )


def likeliest_tokens(logits: torch.Tensor, likeliest: torch.Tensor) -> None:
    """logits [T, V] → int32 [T, K]: the tokens of the K best logits, the best first and of equal ones the lowest.

    −1 for all of a row whose greatest is not a finite number, and for a logit of −∞.
    """
    count, vocabulary = logits.shape
    wanted, blocks = likeliest.shape[1], triton.cdiv(vocabulary, _BLOCK)
    size = count * blocks * wanted
    partials = scratch(logits.device).partials
    values, tokens = partials[:size], partials[size : 2 * size].view(torch.int32)
    _block_leaders_kernel[(count, blocks)](logits, values, tokens, vocabulary, WANTED=wanted, BLOCK=_BLOCK, num_warps=4)
    found = triton.next_power_of_2(blocks * wanted)
    _leaders_kernel[(count,)](values, tokens, likeliest, blocks * wanted, WANTED=wanted, FOUND=found, num_warps=4)


def accept_greedy(choices: torch.Tensor, tokens: torch.Tensor, drafted: torch.Tensor, accepted: torch.Tensor) -> None:
    """choices int64 [T], the pass's tokens int64 [T], `drafted` int64 [1] → accepted int64 [1].

    The first `drafted` tokens behind the first one were drafted: accepted are those before the first that differs from
    the choice one before it. What stands behind them fills up the pass, and counts for nothing.
    """
    count = choices.shape[0]
    _accept_kernel[(1,)](choices, tokens, drafted, accepted, count, SIZE=triton.next_power_of_2(count), num_warps=1)


@triton.jit
def _first_greatest(x, index, known):
    """The greatest of x with its index: the first NaN where there is one, else the first of the greatest."""
    is_nan = known & (x != x)
    counted = known & (x == x)
    greatest = tl.max(tl.where(counted, x, float("-inf")), axis=0)
    first_nan = tl.min(tl.where(is_nan, index, _NONE), axis=0)
    first = tl.min(tl.where(counted & (x == greatest), index, _NONE), axis=0)
    return tl.where(first_nan != _NONE, float("nan"), greatest), tl.where(first_nan != _NONE, first_nan, first)


@triton.jit
def _block_kernel(logits_ptr, best_ptr, second_ptr, index_ptr, vocabulary, BLOCK: tl.constexpr):
    row, block = tl.program_id(0), tl.program_id(1)
    index = block * BLOCK + tl.arange(0, BLOCK)
    known = index < vocabulary
    x = tl.load(logits_ptr + row.to(tl.int64) * vocabulary + index, mask=known, other=0.0).to(tl.float32)
    best, chosen = _first_greatest(x, index, known)
    second, _ = _first_greatest(x, index, known & (index != chosen))
    place = row * tl.num_programs(1) + block
    tl.store(best_ptr + place, best)
    tl.store(second_ptr + place, second)
    tl.store(index_ptr + place, chosen)


@triton.jit
def _merge_kernel(
    block_best_ptr, block_second_ptr, index_ptr, tokens_ptr, best_ptr, second_ptr, blocks, BLOCKS: tl.constexpr
):
    row = tl.program_id(0)
    block = tl.arange(0, BLOCKS)
    known = block < blocks
    places = row * blocks + block
    bests = tl.load(block_best_ptr + places, mask=known, other=0.0)
    seconds = tl.load(block_second_ptr + places, mask=known, other=0.0)
    index = tl.load(index_ptr + places, mask=known, other=_NONE)
    best, chosen = _first_greatest(bests, index, known)
    # What is left: the best of the other blocks, and the second of the block that held the greatest.
    left = tl.where(index == chosen, seconds, bests)
    second, _ = _first_greatest(left, block, known)
    token = tl.where(tl.abs(best) < float("inf"), chosen, -1)  # of NaN the comparison is false too
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(best_ptr + row, best)
    tl.store(second_ptr + row, second)


@triton.jit
def _block_leaders_kernel(logits_ptr, values_ptr, tokens_ptr, vocabulary, WANTED: tl.constexpr, BLOCK: tl.constexpr):
    row, block = tl.program_id(0), tl.program_id(1)
    index = block * BLOCK + tl.arange(0, BLOCK)
    left = index < vocabulary
    x = tl.load(logits_ptr + row.to(tl.int64) * vocabulary + index, mask=left, other=0.0).to(tl.float32)
    place = (row * tl.num_programs(1) + block) * WANTED
    for i in range(WANTED):
        best, chosen = _first_greatest(x, index, left)
        tl.store(values_ptr + place + i, best)
        tl.store(tokens_ptr + place + i, chosen)
        left = left & (index != chosen)


@triton.jit
def _leaders_kernel(values_ptr, tokens_ptr, likeliest_ptr, count, WANTED: tl.constexpr, FOUND: tl.constexpr):
    row = tl.program_id(0)
    place = tl.arange(0, FOUND)
    left = place < count
    x = tl.load(values_ptr + row * count + place, mask=left, other=0.0)
    tokens = tl.load(tokens_ptr + row * count + place, mask=left, other=_NONE)
    greatest, _ = _first_greatest(x, tokens, left)
    for i in range(WANTED):
        best, chosen = _first_greatest(x, tokens, left)
        is_choice = (tl.abs(greatest) < float("inf")) & (best > float("-inf"))
        tl.store(likeliest_ptr + row * WANTED + i, tl.where(is_choice, chosen, -1))
        left = left & (tokens != chosen)


@triton.jit(do_not_specialize=["count"])  # one kernel for every T
def _accept_kernel(choices_ptr, tokens_ptr, drafted_ptr, accepted_ptr, count, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    drafted = tl.minimum(tl.load(drafted_ptr).to(tl.int32), count - 1)
    known = index < drafted
    chosen = tl.load(choices_ptr + index, mask=known, other=0)
    draft = tl.load(tokens_ptr + index + 1, mask=known, other=0)
    differing = tl.where(known & (chosen != draft), index, drafted)
    tl.store(accepted_ptr, tl.min(differing, axis=0).to(tl.int64))
