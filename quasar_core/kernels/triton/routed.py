"""Products with the weights of chosen experts, which are read from where they lie, each once for all of its rows.

A program has an expert and a block of its outputs. Which places chose that expert it reads from device memory, so a
recorded launch serves any choice; where nobody did, it ends at once. A weight is found by its address: experts need
not lie beside one another, and are held once. Rows are taken sixteen at a time (of packed codes eight), whatever the
pass is, by the same instruction and in the same order: a row's result does not depend on the rows beside it. An expert
of more rows is read again for those, from the cache if it is still there. Letters: T tokens of a pass, E experts, k
experts of a token, P = T·k places.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quasar_core.kernels.triton.blocks import TILE_ROWS, Blocks, dense_rule, gated_blocks, packed_rule, splits_for
from quasar_core.kernels.triton.language import ROWS, matrix_product, overlap, scratch, wait
from quasar_core.kernels.triton.packed import MAGIC, load_table, load_words, multiply_tile, numbers_of, scale_and_zero
from quasar_core.kernels.triton.products import outputs_of
from quasar_core.kernels.triton.weights import BLOCK, TritonWeight

_FEW = 16  # tokens up to which one kernel serves all numbers of them, and another one beyond
MOST_TOKENS = 40
_ALIGNED = 16  # bytes: what a lane loads at once
TILE = tl.constexpr(TILE_ROWS)


@dataclass(frozen=True)
class RoutedWeight:
    """One product of all experts: their weights, which are alike, and where each lies."""

    weights: tuple[torch.Tensor | TritonWeight, ...]  # [out, in] of 16 bits, or codes
    addresses: torch.Tensor  # [E] int64, on the device
    chosen: int  # k

    @property
    def first(self) -> torch.Tensor | TritonWeight:
        """What a kernel takes of all of them."""
        return self.weights[0]

    @property
    def sizes(self) -> tuple[int, int]:
        """Outputs and inputs."""
        if isinstance(self.first, TritonWeight):
            return self.first.out_features, self.first.in_features
        return self.first.shape[0], self.first.shape[1]


def routed_weight(weights: Sequence[torch.Tensor | TritonWeight], chosen: int) -> RoutedWeight:
    """The product of experts' weights, which stay where they are; ValueError where they are not alike."""
    if len({_likeness(weight) for weight in weights}) != 1:
        raise ValueError("the experts' weights are not alike")
    tensors = [weight.words if isinstance(weight, TritonWeight) else weight for weight in weights]
    if any(tensor.data_ptr() % _ALIGNED or not tensor.is_contiguous() for tensor in tensors):
        raise ValueError(f"the experts' weights do not begin at multiples of {_ALIGNED} bytes")
    addresses = torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64, device=tensors[0].device)
    return RoutedWeight(tuple(weights), addresses, chosen)


def _likeness(weight: torch.Tensor | TritonWeight) -> tuple[object, ...]:
    """What a kernel takes as the same for all experts."""
    if isinstance(weight, TritonWeight):
        sizes = weight.in_features, weight.out_features
        return (*weight.words.shape, weight.bits, weight.middle, weight.chunk, weight.has_zeros, *sizes)
    return (*weight.shape, weight.dtype)


def routed_blocks(weight: RoutedWeight, device: torch.device, gated: bool) -> Blocks:
    """A rule of thumb's block shapes: those of one expert, the inputs split as k experts' programs leave room for.

    The same for any number of tokens and whatever has been tuned meanwhile, so that a row's sums are.
    """
    first, (outputs, inputs) = weight.first, weight.sizes
    is_packed = isinstance(first, TritonWeight)
    plain = packed_rule(first, device) if isinstance(first, TritonWeight) else dense_rule(first, device)
    shape = gated_blocks(plain, inputs, outputs, packed=is_packed) if gated else plain
    blocks, steps = -(-outputs // shape.outputs), -(-inputs // shape.inputs)
    splits = splits_for(blocks * weight.chosen, steps, device)
    slots = min(MOST_TOKENS * weight.chosen, len(weight.addresses))
    has_room = scratch(device).fits(splits, MOST_TOKENS * weight.chosen * outputs, blocks * slots)
    return Blocks(shape.outputs, shape.inputs, splits if has_room else 1, shape.stages)


def multiply_routed(
    x: torch.Tensor, weight: RoutedWeight, chosen: torch.Tensor, out: torch.Tensor, gated: bool = False
) -> None:
    """Each place's row of x times its expert's weight, in the places' order.

    Chosen [T, k] are experts, or negative for nobody, whose rows of `out` are left alone; T is at most 40. Of x [T, in]
    all places of a token read one row, of x [P, in] each its own. → out [P, out]; `gated` stores silu(gate) · up in out
    [P, out ÷ 2], the first half of the outputs being gates.
    """
    (outputs, inputs), places, device = weight.sizes, chosen.numel(), x.device
    shape, space = routed_blocks(weight, device, gated), scratch(device)
    slots = min(places, len(weight.addresses))
    most = weight.chosen * (_FEW if places <= _FEW * weight.chosen else MOST_TOKENS)
    steps = -(-inputs // shape.inputs)
    shared = (x, weight.addresses, out, chosen, space.partials, space.counters, places, int(slots < places))
    options = {
        "READERS": places // len(x),
        "PLACES": triton.next_power_of_2(most),
        "SPLITS": shape.splits,
        "STEPS": -(-steps // shape.splits),
        "GATED": gated,
        "num_warps": 4,
        "num_stages": shape.stages,
        **overlap(),
    }
    grid = (-(-outputs // shape.outputs), slots, shape.splits)
    first = weight.first
    if isinstance(first, TritonWeight):
        _routed_packed_kernel[grid](
            *shared,
            inputs,
            outputs,
            first.words.shape[0],
            first.steps,
            MAGIC[x.dtype],
            BITS=first.bits,
            MIDDLE=first.middle,
            CHUNK=first.chunk,
            TABLES=first.tables,
            HAS_ZEROS=first.has_zeros,
            STORED=shape.outputs // BLOCK,
            **options,
        )
    else:
        _routed_kernel[grid](*shared, inputs, outputs, steps, OUTPUTS=shape.outputs, INPUTS=shape.inputs, **options)


@triton.jit
def places_of(slot, chosen_ptr, places, by_expert, PLACES: tl.constexpr):
    """A slot's expert, which of its rows each place is (or −1), and how many there are.

    Slots are experts where these are fewer than places; else places, of which the first with an expert has all others.
    """
    place = tl.arange(0, PLACES)
    chosen = tl.load(chosen_ptr + place, mask=place < places, other=-1)
    expert = slot
    if by_expert == 0:
        expert = tl.load(chosen_ptr + slot)
    own = (chosen == expert) & (chosen >= 0)
    first = tl.min(tl.where(own, place, PLACES), axis=0)
    own &= (by_expert != 0) | (first == slot)
    found = own.to(tl.int32)
    return tl.maximum(expert, 0), tl.where(own, tl.cumsum(found, 0) - 1, -1), tl.sum(found, axis=0)


@triton.jit
def _places_in(rank, begin, LINES: tl.constexpr):
    """The places of an expert's rows from `begin` on [LINES]."""
    line = begin + tl.arange(0, LINES)
    place = tl.arange(0, rank.shape[0])
    return tl.sum(tl.where(rank[None, :] == line[:, None], place[None, :], 0), axis=1)


@triton.jit
def _leave(
    acc,  # [outputs, LINES] float32
    place,  # [LINES]
    known,
    outputs,
    block,
    split,
    out_ptr,
    partials_ptr,
    places,
    out_features,
    SPLITS: tl.constexpr,
    GATED: tl.constexpr,
):
    """Store a tile's sums, or one part of them where others have the rest."""
    if SPLITS == 1:
        _store(acc, place, known, outputs, block, out_ptr, out_features, GATED)
    else:
        rows = (split * places + place)[None, :] * out_features + outputs[:, None]
        tl.store(partials_ptr + rows, acc, mask=known[None, :] & (outputs < out_features)[:, None])


@triton.jit
def _store(total, place, known, outputs, block, out_ptr, out_features, GATED: tl.constexpr):
    columns, width = outputs, out_features
    if GATED:
        half: tl.constexpr = total.shape[0] // 2
        gate, up = tl.split(tl.permute(tl.reshape(total, (2, half, total.shape[1])), (1, 2, 0)))
        total = gate / (1 + tl.exp(-gate)) * up
        columns, width = block * half + tl.arange(0, half), out_features // 2
    rows = out_ptr + place[None, :] * width + columns[:, None]
    tl.store(rows, total.to(out_ptr.dtype.element_ty), mask=known[None, :] & (columns < width)[:, None])


@triton.jit
def _add_parts(
    rank,
    count,
    outputs,
    block,
    slot,
    out_ptr,
    partials_ptr,
    counters_ptr,
    places,
    out_features,
    LINES: tl.constexpr,
    SPLITS: tl.constexpr,
    GATED: tl.constexpr,
):
    """The last of an expert's programs to arrive at a block adds all parts, in order, whoever it is."""
    if count > 0:
        tl.debug_barrier()  # all threads have stored before one of them says so
        counter = counters_ptr + slot * tl.num_programs(0) + block
        if tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1:
            for begin in range(0, count, LINES):
                place, known = _places_in(rank, begin, LINES), begin + tl.arange(0, LINES) < count
                inside = known[None, :] & (outputs < out_features)[:, None]
                total = tl.zeros((outputs.shape[0], LINES), tl.float32)
                for i in range(SPLITS):
                    rows = (i * places + place)[None, :] * out_features + outputs[:, None]
                    total += tl.load(partials_ptr + rows, mask=inside, other=0.0, cache_modifier=".cg")
                _store(total, place, known, outputs, block, out_ptr, out_features, GATED)
            tl.store(counter, 0)


@triton.jit
def _weight_at(addresses_ptr, expert, dtype: tl.constexpr):
    """Where an expert's weight begins: a multiple of 16 bytes."""
    return tl.multiple_of(tl.load(addresses_ptr + expert).to(tl.pointer_type(dtype)), 16)


@triton.jit(do_not_specialize=["places", "by_expert"])
def _routed_kernel(
    x_ptr,
    addresses_ptr,
    out_ptr,
    chosen_ptr,
    partials_ptr,
    counters_ptr,
    places,
    by_expert,
    in_features,
    out_features,
    steps,
    READERS: tl.constexpr,
    PLACES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    STEPS: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    block, slot, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    wait(OVERLAPS)
    expert, rank, count = places_of(slot, chosen_ptr, places, by_expert, PLACES)
    outputs = outputs_of(block, out_features, OUTPUTS, GATED)
    weight_ptr = _weight_at(addresses_ptr, expert, x_ptr.dtype.element_ty)
    lines = weight_ptr + outputs[:, None].to(tl.int64) * in_features
    for begin in range(0, count, ROWS):
        place, known = _places_in(rank, begin, ROWS), begin + tl.arange(0, ROWS) < count
        acc = tl.zeros((OUTPUTS, ROWS), tl.float32)
        for step in range(split * STEPS, tl.minimum(split * STEPS + STEPS, steps)):
            inputs = step * INPUTS + tl.arange(0, INPUTS)
            inside = (outputs[:, None] < out_features) & (inputs[None, :] < in_features)
            weight = tl.load(lines + inputs[None, :], mask=inside, other=0.0)
            x = tl.load(
                x_ptr + (place // READERS)[None, :] * in_features + inputs[:, None],
                mask=known[None, :] & (inputs[:, None] < in_features),
                other=0.0,
            )
            acc = matrix_product(weight, x, acc)
        _leave(acc, place, known, outputs, block, split, out_ptr, partials_ptr, places, out_features, SPLITS, GATED)
    if SPLITS > 1:
        _add_parts(
            rank, count, outputs, block, slot, out_ptr, partials_ptr, counters_ptr, places, out_features, ROWS, SPLITS,
            GATED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["places", "by_expert"])
def _routed_packed_kernel(
    x_ptr,
    addresses_ptr,
    out_ptr,
    chosen_ptr,
    partials_ptr,
    counters_ptr,
    places,
    by_expert,
    in_features,
    out_features,
    stored_blocks,
    steps,
    magic,
    READERS: tl.constexpr,
    PLACES: tl.constexpr,
    BITS: tl.constexpr,
    MIDDLE: tl.constexpr,
    CHUNK: tl.constexpr,
    TABLES: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    STORED: tl.constexpr,
    SPLITS: tl.constexpr,
    STEPS: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    block, slot, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    chunks: tl.constexpr = 16 // BITS
    share: tl.constexpr = 16 // BITS // TABLES  # chunks whose scales are in one word
    wait(OVERLAPS)
    expert, rank, count = places_of(slot, chosen_ptr, places, by_expert, PLACES)
    words_ptr = _weight_at(addresses_ptr, expert, tl.int32)
    stored = tl.minimum(outputs_of(block, stored_blocks, STORED, GATED), stored_blocks - 1)
    outputs = outputs_of(block, out_features, 64 * STORED, GATED)
    first = split * STEPS
    for begin in range(0, count, TILE):
        place, known = _places_in(rank, begin, TILE), begin + tl.arange(0, TILE) < count
        rows = x_ptr + (place // READERS)[None, :] * in_features
        acc = tl.zeros((64 * STORED, TILE), tl.float32)
        following = load_table(words_ptr, stored, first, steps, 0, TABLES, STORED, CHUNK)
        for step in range(first, tl.minimum(first + STEPS, steps)):
            words = load_words(words_ptr, stored, step, steps, TABLES, STORED, CHUNK)
            for i in tl.static_range(chunks):
                if i % share == 0:
                    table = following  # the next is asked for now, so that the wait for it passes during this one
                    following = load_table(words_ptr, stored, step, steps, i // share + 1, TABLES, STORED, CHUNK)
                scale, zero = scale_and_zero(table >> (16 * (i % share)), HAS_ZEROS, MIDDLE)
                inputs = (step * chunks + i) * CHUNK + tl.arange(0, CHUNK)
                inside = known[None, :] & (inputs[:, None] < in_features)
                x = tl.load(rows + inputs[:, None], mask=inside, other=0.0)
                high, low = numbers_of(words, zero, i, magic, x, BITS)
                acc += multiply_tile(high, low, x, BITS) * scale[:, None]
        _leave(acc, place, known, outputs, block, split, out_ptr, partials_ptr, places, out_features, SPLITS, GATED)
    if SPLITS > 1:
        _add_parts(
            rank, count, outputs, block, slot, out_ptr, partials_ptr, counters_ptr, places, out_features, TILE, SPLITS,
            GATED,
        )  # fmt: skip
