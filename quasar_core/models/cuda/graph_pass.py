"""Run the short passes of a decoder on CUDA: ten launches per layer, recorded when first needed, then replayed.

The position and the tokens lie on the device, so a graph serves every position; it is recorded for a cache, a number
of tokens, and the bucket of lengths that bounds attention. Numbers and buckets are few, as each graph takes time to
record: a pass is padded with tokens behind its own, which its own do not see, and whose keys and values the next pass
overwrites. The host sends one small buffer before a pass; a pass ends with its greedy tokens and how many drafted ones
they confirm, and the host waits once, for these. Logits stay on the device unless they are asked for.

Launches may overlap, which hides what a launch costs; whether it gains depends on the device and on the products. It
is tried on the decoder itself, and taken only where it is faster and equal to the last bit. Letters: T tokens of a
pass, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from weakref import WeakSet

import torch

from quasar_core.kernels.triton.adapters import why_not_triton
from quasar_core.models.base import Choices
from quasar_core.models.cuda.graphs import LONGEST_TREE, Launcher, PinnedBuffers, PlainLauncher, TreeInputs, launcher
from quasar_core.models.cuda.products import DenseChoices, tune_products
from quasar_core.models.cuda.torch_steps import Activation, Rows, Steps, TorchSteps
from quasar_core.models.decoder import DecoderCache, LeanDecoder, Linear
from quasar_core.models.heads import Tables
from quasar_core.models.memory import LONGEST_PASS
from quasar_core.models.rope import query_growth
from quasar_core.records import Progress, no_progress
from quasar_core.timing import time_in_turn, timed

SIZES = (1, 2, 4, 8, 16, 24, LONGEST_PASS)  # tokens of the recorded passes
SHORTEST_BUCKET, GROWTH = 1024, 4


def why_not(decoder: LeanDecoder) -> str | None:
    """Why a decoder's passes cannot be recorded, or None where they can."""
    if decoder.config.is_recurrent or decoder.config.gates_attention:
        return "states of recurrent layers and gates of attention are not recorded"
    if any(rope.limit is not None for rope in decoder.ropes):
        return "its rotary embedding depends on where a pass ends"
    if any(layer.choice.kernel.name == "reference" for layer in decoder.packed_layers):
        return "the reference kernel dequantizes its weight for every product"
    return None


def choose(decoder: LeanDecoder, progress: Progress = no_progress) -> tuple["CudaPass | None", str]:
    """The recorded pass of a decoder on CUDA, or None, and a sentence that says which and why."""
    obstacle = why_not(decoder)
    if obstacle:
        return None, f"passes: PyTorch's operations, not recorded: {obstacle}"
    steps, why = choose_steps(decoder.device, decoder.dtype)
    notes = [f"passes: {LONGEST_PASS} tokens at a time as CUDA graphs of {why}"]
    if steps.name != "Triton":
        return CudaPass(decoder, steps), notes[0]
    notes.append(tune_products(decoder, progress))
    fast, overlap = _choose_overlap(decoder, steps, progress)
    fast.note = "; ".join(note for note in [*notes, overlap] if note)
    return fast, fast.note


def _choose_overlap(decoder: LeanDecoder, steps: Steps, progress: Progress) -> tuple["CudaPass", str]:
    """The pass whose launches overlap where that can be had and gains, else the plain one; and a sentence."""
    from quasar_core.kernels.triton.language import why_not_overlapping
    from quasar_core.models.cuda.triton_steps import TritonSteps

    obstacle = why_not_overlapping(decoder.device)
    if obstacle:
        return CudaPass(decoder, steps), f"launches do not overlap: {obstacle}"
    progress("trying launches that overlap", 0, 1)
    found = choose_overlap(decoder, steps, TritonSteps(overlaps=True))
    progress("trying launches that overlap", 1, 1)
    return found


def choose_steps(device: torch.device, dtype: torch.dtype) -> tuple[Steps, str]:
    """Triton's kernels where they run, else PyTorch's operations; and why."""
    obstacle = why_not_triton(device, dtype)
    if obstacle:
        return TorchSteps(), f"PyTorch's operations, not Triton's: {obstacle}"
    from quasar_core.models.cuda.triton_steps import TritonSteps

    return TritonSteps(), "Triton's kernels"


class CudaPass:
    """Implements `models.base.FastPass`. On other devices the same steps run unrecorded: so they are tested."""

    name = "CUDA graphs"
    longest_tree = LONGEST_TREE

    def __init__(self, decoder: LeanDecoder, steps: Steps, launches: Launcher | None = None) -> None:
        self.decoder, self.steps = decoder, steps
        self.longest = LONGEST_PASS
        self.note = ""  # how it was chosen
        device = decoder.device
        self.dense = DenseChoices(decoder, steps)
        self._launches = launches or launcher(device)
        self._buffers = PinnedBuffers(self.longest, device)
        self._logits = torch.empty(self.longest, decoder.vocab_size, dtype=decoder.dtype, device=device)
        self._tables: dict[int, PositionTables] = {}  # by capacity of the cache
        self._cleared: WeakSet[DecoderCache] = WeakSet()
        self._sights = {(block.window, block.kv_heads) for block in decoder.config.blocks}

    @torch.inference_mode()
    def run(self, tokens: Sequence[int], cache: DecoderCache, parents: Sequence[int] | None = None) -> torch.Tensor:
        """One pass at position `cache.length`, which moves on by T → float32 logits [T, V]."""
        self._pass(tokens, cache, likeliest=False, parents=parents)
        return self._logits[: len(tokens)].to(torch.float32, copy=True)  # the next pass writes over these

    @torch.inference_mode()
    def choose(
        self, tokens: Sequence[int], cache: DecoderCache, likeliest: int = 0, *, parents: Sequence[int] | None = None
    ) -> Choices:
        """One pass at position `cache.length`, which moves on by T, and the choices that the device made."""
        self._pass(tokens, cache, likeliest > 0, parents)
        return self._buffers.fetch(len(tokens), likeliest, is_tree=parents is not None)

    def _pass(self, tokens: Sequence[int], cache: DecoderCache, likeliest: bool, parents: Sequence[int] | None) -> None:
        count = len(tokens)
        size = pass_size(count, cache.capacity - cache.length)
        self._clear(cache)
        self._buffers.send(cache.length, tokens, size - count, parents)
        is_tree = parents is not None
        bucket = length_bucket(cache.length + size, cache.capacity)
        tables = self._tables.get(cache.capacity) or self._cut_tables(cache.capacity)
        with self.steps.launching():
            self.dense.choose(size)
            kind = size, bucket, likeliest, is_tree
            self._launches.run(cache, kind, lambda: self._launch(size, cache, bucket, tables, likeliest, is_tree))
        cache.advance(count)

    def _clear(self, cache: DecoderCache) -> None:
        """Once for a cache: what lies behind its length may be anything, and a mask does not hide what is no number."""
        if cache not in self._cleared:
            for states in cache.layers:
                states[:, :, cache.length :] = 0
            self._cleared.add(cache)

    def _cut_tables(self, positions: int) -> "PositionTables":
        """Kept: longer ones may replace the model's, and graphs read on in these."""
        self._tables[positions] = tables = PositionTables.of(self.decoder, positions)
        return tables

    def _launch(
        self, count: int, cache: DecoderCache, bucket: int, tables: "PositionTables", likeliest: bool, is_tree: bool
    ) -> None:
        """All steps of a pass of the `count` tokens in the input buffer, into `_logits`; then its choices."""
        decoder, steps, config = self.decoder, self.steps, self.decoder.config
        position, tokens, logits = self._buffers.position, self._buffers.tokens[:count], self._logits[:count]
        tree = self._buffers.tree(count) if is_tree else None
        masks = {
            (window, heads): steps.make_mask(position, bucket, count, window, config.num_heads // heads, tree)
            for window, heads in self._sights
        }
        hidden, inputs = decoder.embed(tokens)
        delta = None
        for layer, states, given in zip(decoder.layers, cache.layers, inputs, strict=True):
            x = self._normed(hidden, delta, layer.input_norm, layer.qkv)
            rope = layer.shape.rope
            queries = steps.rotate_and_store(
                self.dense.multiply(layer.qkv, x),
                decoder.turn(layer),
                None if rope is None else tables.rotations[rope],
                position,
                states,
                tree,
            )
            queries = tables.grown(queries, position, tree)
            mask = masks[layer.shape.window, layer.shape.kv_heads]
            x = steps.attend(queries, states, mask, config.scores_scale, config.scores_cap)
            delta = self._behind(self.dense.multiply(layer.out, x), layer.out_norm)
            x = self._normed(hidden, delta, layer.mlp_norm, layer.gate_up)
            activation = Activation(config.activation, config.gated, layer.activation)
            x = self.dense.gate(layer.gate_up, x, self.dense.number_for(layer.down, count), activation)
            delta = self._behind(self.dense.multiply(layer.down, x), layer.down_norm)
            if given is not None:
                hidden += delta
                delta = self._behind(decoder.own_input(layer, hidden, given), layer.input_out_norm)
            if layer.scalar is not None:
                hidden, delta = hidden.add_(delta).mul_(layer.scalar), None
        x = self._normed(hidden, delta, decoder.norm, decoder.head)
        logits.copy_(decoder.logits(self.dense.multiply(decoder.head, x)))
        output = self._buffers.output.first(count)
        steps.choose(logits, tokens, self._buffers.drafted, output)
        if likeliest:
            steps.find_likeliest(logits, output.likeliest)

    def _normed(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, norm: torch.Tensor | None, product: Linear
    ) -> Rows:
        """Add `delta` to the residual stream in place; what `product` reads of it, in the form that it takes."""
        if norm is None:
            return hidden if delta is None else hidden.add_(delta)
        number = self.dense.number_for(product, len(hidden))
        return self.steps.normed(hidden, delta, norm, self.decoder.config.eps, number)

    def _behind(self, delta: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        """What attention or the MLP gives, behind its norm, times the residual's factor."""
        config = self.decoder.config
        if norm is not None:
            normed = self.steps.normed(delta, None, norm, config.eps)
            assert isinstance(normed, torch.Tensor)  # no number was asked for
            delta = normed
        return delta if config.residual_scale == 1 else delta * config.residual_scale


@dataclass(frozen=True)
class PositionTables:
    """What a pass reads by its positions: cosines and sines [positions, D] of each rotation, and queries' growth."""

    rotations: list[Tables]
    growth: torch.Tensor | None  # [positions]

    @classmethod
    def of(cls, decoder: LeanDecoder, positions: int) -> "PositionTables":
        """For a cache of that capacity."""
        rows = (rope.rows(0, positions) for rope in decoder.ropes)
        growth = None
        if decoder.config.query_growth:
            places = torch.arange(positions, device=decoder.device)
            growth = query_growth(places, *decoder.config.query_growth).to(decoder.dtype)
        return cls([(cos[:, 0], sin[:, 0]) for cos, sin in rows], growth)

    def grown(self, queries: torch.Tensor, position: torch.Tensor, tree: TreeInputs | None = None) -> torch.Tensor:
        """Queries [T, H·G, D] at `position` [1], a tensor on the device, as they grow with it."""
        if self.growth is None:
            return queries
        places = position + (torch.arange(len(queries), device=queries.device) if tree is None else tree.depths)
        return queries * self.growth.index_select(0, places)[:, None, None]


def pass_size(count: int, room: int) -> int:
    """Tokens of the recorded pass that serves `count` of them; where the cache ends too soon for it, `count` itself."""
    size = next(size for size in SIZES if size >= count)
    return size if size <= room else count


def length_bucket(length: int, capacity: int) -> int:
    """The bound on the positions that a graph attends to: 1024, four times that, and so on, at most all of them."""
    bucket = SHORTEST_BUCKET
    while bucket < length:
        bucket *= GROWTH
    return min(bucket, capacity)


COUNTS = (1, 8)  # tokens of the passes that are tried: plain decoding's, and a verify's
POSITION = 500
ROUNDS = 20


def choose_overlap(decoder: LeanDecoder, plain: Steps, overlapping: Steps) -> tuple[CudaPass, str]:
    """The faster of two passes of a decoder, and a sentence; the plain one where the other fails, or differs."""
    apart = CudaPass(decoder, plain)
    cache = cache_at(decoder, POSITION)
    try:
        overlapped = CudaPass(decoder, overlapping)
        differing = differing_passes(decoder, plain, overlapped, cache)
        seconds = time_passes([apart, overlapped], cache)
    except RuntimeError as error:
        return apart, f"launches do not overlap: it failed here ({str(error).splitlines()[0]})"
    if differing:
        return apart, f"launches do not overlap: {differing} of {ROUNDS * len(COUNTS)} passes differed"
    figures = (
        f"{1e6 * seconds[1]:.0f} µs for passes of {' and '.join(map(str, COUNTS))}, {1e6 * seconds[0]:.0f} without"
    )
    if seconds[1] < seconds[0]:
        return overlapped, f"launches overlap: {figures}"
    return apart, f"launches do not overlap: with it {figures}"


def differing_passes(decoder: LeanDecoder, plain: Steps, overlapped: CudaPass, cache: DecoderCache) -> int:
    """Passes that overlap, and whose logits are not to the last bit those of the same kernels one after the other."""
    apart, differing = CudaPass(decoder, plain, PlainLauncher()), 0
    apart.dense = overlapped.dense
    for count in COUNTS:
        overlapped.run([0] * count, cache)  # which chooses the products
        cache.rollback(POSITION)
        expected = apart.run([0] * count, cache)
        cache.rollback(POSITION)
        for _ in range(ROUNDS):
            differing += not torch.equal(overlapped.run([0] * count, cache), expected)
            cache.rollback(POSITION)
    return differing


def time_passes(passes: Sequence[CudaPass], cache: DecoderCache) -> list[float]:
    """Seconds of each, the medians of all counts added up; they take turns."""

    def choose(number: int, count: int) -> None:
        cache.rollback(POSITION)
        passes[number].choose([0] * count, cache)

    turns = [(number, count) for count in COUNTS for number in range(len(passes))]
    samplers = {turn: timed(partial(choose, *turn)) for turn in turns}
    timings = time_in_turn(samplers, rounds=ROUNDS, warm_up=True)  # the first pass of a size records it
    cache.rollback(POSITION)
    return [sum(timings[number, count].median for count in COUNTS) for number in range(len(passes))]


def cache_at(decoder: LeanDecoder, length: int) -> DecoderCache:
    """A cache of zeros that stands there."""
    cache = decoder.new_cache(SHORTEST_BUCKET)
    for states in cache.layers:
        states.zero_()
    cache.advance(length)
    return cache
