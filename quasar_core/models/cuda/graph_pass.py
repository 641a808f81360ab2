"""Run the short passes of a decoder on CUDA: nine launches a layer, or five, recorded when first needed, then replayed.

The position and the tokens lie on the device, so a graph serves every position; it is recorded for a cache, a number
of tokens and, in PyTorch's operations, the bucket of lengths that bounds attention. Numbers and buckets are few, as
each graph takes time to record: a pass is padded with tokens behind its own, which its own do not see, and whose keys
and values the next pass overwrites. The host sends one small buffer before a pass; a pass ends with its greedy tokens
and how many drafted ones they confirm, and the host waits once, for these. Logits stay on the device unless they are
asked for.

Where a decoder's weights come block by block (`device_stream.py`), what waits for them is in no graph: its passes are
launched plainly, each block when it is there, and take as many tokens as the longest window has, so that one sweep is
enough for them.

In Triton's kernels a token's logits are the same to the last bit whatever tokens are passed with it, unless `fast`
asks for what may be faster: each product by the fastest way for its rows, trees, and launches that overlap, which are
tried on the decoder itself (`overlap.py`). Letters: T tokens of a pass, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet, ref

import torch

from quasar_core.kernels.gpu import on
from quasar_core.models.base import Choices
from quasar_core.models.cuda.graphs import (
    LONGEST_TREE,
    Launcher,
    PinnedBuffers,
    PlainLauncher,
    Timing,
    TreeInputs,
    launcher,
)
from quasar_core.models.cuda.products import DenseChoices
from quasar_core.models.cuda.torch_steps import SHORTEST_BUCKET, Activation, Rows, Steps
from quasar_core.models.decoder.cache import DecoderCache
from quasar_core.models.decoder.heads import Tables
from quasar_core.models.decoder.layer import DecoderLayer, Linear
from quasar_core.models.decoder.layer_source import AllThere
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.memory.estimate import LONGEST_PASS, LONGEST_SWEEP
from quasar_core.models.rope import query_growth

SIZES = (1, 2, 4, 8, 16, 24, LONGEST_PASS)  # tokens of the recorded passes


class CudaPass:
    """Implements `models.base.FastPass`. On other devices the same steps run unrecorded: so they are tested."""

    gives_rows = False

    def __init__(
        self,
        decoder: LeanDecoder,
        steps: Steps,
        launches: Launcher | None = None,
        *,
        fast: bool = False,
        joins_norms: bool = False,
    ) -> None:
        self.decoder, self.steps = decoder, steps
        self.sweeps = sweeps(decoder)
        self.name = "CUDA graphs, fast" if fast else "CUDA graphs"  # remembered costs are of one or the other
        self.name = "CUDA, block by block" if self.sweeps else self.name
        self.longest, self.longest_prompt = LONGEST_SWEEP if self.sweeps else LONGEST_PASS, 0
        self.longest_tree = LONGEST_TREE if fast or _may_differ(decoder, steps) else 0
        self.note = ""  # how it was chosen
        self.joins_norms = joins_norms  # products apply the norms, in Triton's kernels
        device = decoder.device
        self.dense = DenseChoices(decoder, steps, measures=fast)
        self._mixtures = _mixtures(decoder)
        self._launches = launches or (PlainLauncher() if self.sweeps else launcher(device))
        self._buffers = PinnedBuffers(self.longest, device)
        self._logits = torch.empty(self.longest, decoder.vocab_size, dtype=decoder.dtype, device=device)
        self._tables: dict[int, PositionTables] = {}  # by capacity of the cache
        self._begun: ref[BegunPass] | None = None
        self._cleared: WeakSet[DecoderCache] = WeakSet()
        self._sights = {(block.window, block.kv_heads) for block in decoder.config.blocks}

    @torch.inference_mode()
    def run(
        self,
        tokens: Sequence[int],
        cache: DecoderCache,
        parents: Sequence[int] | None = None,
        last_only: bool = False,
    ) -> torch.Tensor:
        """One pass at position `cache.length`, which moves on by T → float32 logits [T, V], [1, V] with `last_only`."""
        with on(self.decoder.device):
            self._pass(tokens, cache, likeliest=False, parents=parents)
        cache.advance(len(tokens))
        first = len(tokens) - 1 if last_only else 0
        return self._logits[first : len(tokens)].to(torch.float32, copy=True)  # the next pass writes over these

    @torch.inference_mode()
    def choose(
        self, tokens: Sequence[int], cache: DecoderCache, likeliest: int = 0, *, parents: Sequence[int] | None = None
    ) -> Choices:
        """One pass at position `cache.length`, which moves on by T, and the choices that the device made."""
        return self.begin(tokens, cache, likeliest, parents=parents).fetch()

    @torch.inference_mode()
    def begin(
        self, tokens: Sequence[int], cache: DecoderCache, likeliest: int = 0, *, parents: Sequence[int] | None = None
    ) -> "BegunPass":
        """See `models/base.py`."""
        with on(self.decoder.device):
            cache.check_room(len(tokens))
            timing = Timing(self.decoder.device)
            self._pass(tokens, cache, likeliest > 0, parents)
            begun = BegunPass(self._buffers, timing, cache, len(tokens), likeliest, parents is not None)
            timing.end()
        self._begun = ref(begun)
        return begun

    def _pass(self, tokens: Sequence[int], cache: DecoderCache, likeliest: bool, parents: Sequence[int] | None) -> None:
        """Launch it. What an earlier pass left is brought over first, if somebody may still want it."""
        earlier = None if self._begun is None else self._begun()
        if earlier is not None:
            earlier.bring_over()
        count = len(tokens)
        size = count if self.sweeps else pass_size(count, cache.capacity - cache.length)
        self._clear(cache)
        self._buffers.send(cache.length, tokens, size - count, parents)
        is_tree = parents is not None
        bound = self.steps.bound(cache.length + size, cache.capacity)
        tables = self._tables.get(cache.capacity) or self._cut_tables(cache.capacity)
        with self.steps.launching():
            if not self.joins_norms:
                self.dense.choose(size)
            kind = size, bound, likeliest, is_tree
            self._launches.run(cache, kind, lambda: self._launch(size, cache, bound, tables, likeliest, is_tree))

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
        self, count: int, cache: DecoderCache, bound: int, tables: "PositionTables", likeliest: bool, is_tree: bool
    ) -> None:
        """All steps of a pass of the `count` tokens in the input buffer, into `_logits`; then its choices."""
        decoder, steps, config = self.decoder, self.steps, self.decoder.config
        position, tokens, logits = self._buffers.position, self._buffers.tokens[:count], self._logits[:count]
        tree = self._buffers.tree(count) if is_tree else None
        masks = {
            (window, heads): steps.make_mask(position, bound, count, window, config.num_heads // heads, tree)
            for window, heads in self._sights
        }

        def attention(index: int, qkv: torch.Tensor) -> torch.Tensor:
            """Write a block's keys and values to the cache, then mix the values."""
            layer, states = decoder.layers[index], cache.layers[index]
            rope = None if layer.shape.rope is None else tables.rotations[layer.shape.rope]
            turn, mask = decoder.turn(layer), masks[layer.shape.window, layer.shape.kv_heads]
            scores = config.scores_scale, config.scores_cap
            if tables.growth is None:
                return steps.turn_and_attend(qkv, turn, rope, position, states, mask, *scores, tree)
            queries = tables.grown(steps.rotate_and_store(qkv, turn, rope, position, states, tree), position, tree)
            return steps.attend(queries, states, mask, *scores)

        logits.copy_(decoder.logits(self._run_blocks(tokens, attention)))
        output = self._buffers.output.first(count)
        steps.choose(logits, tokens, self._buffers.drafted, output)
        if likeliest:
            steps.find_likeliest(logits, output.likeliest)

    def _run_blocks(self, tokens: torch.Tensor, attention: Callable[[int, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Embedding, all blocks and the head → its product [T, V]."""
        decoder = self.decoder
        hidden, inputs = decoder.embed(tokens)
        if self.joins_norms:
            from quasar_core.models.cuda.joined_norms import run_joined

            return run_joined(decoder, hidden, attention)
        delta = None
        for layers in decoder.source.stretches():
            for index in layers:
                delta = self._run_block(index, hidden, delta, inputs[index], attention)
        return self.dense.multiply(decoder.head, self._normed(hidden, delta, decoder.norm, decoder.head))

    def _run_block(
        self,
        index: int,
        hidden: torch.Tensor,
        delta: torch.Tensor | None,
        given: torch.Tensor | None,
        attention: Callable[[int, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor | None:
        """Add `delta` to the residual stream, then what a block gives but for its last part, which is returned."""
        decoder, layer = self.decoder, self.decoder.layers[index]
        x = self._normed(hidden, delta, layer.input_norm, self._reader(layer, len(hidden)))
        mixed = attention(index, self.dense.multiply(layer.qkv, x))
        if layer.mix_gate is not None:
            mixed = mixed * self.dense.multiply(layer.mix_gate, x).sigmoid()
        delta = self._behind(self.dense.multiply(layer.out, mixed), layer.out_norm)
        if layer.experts is None:
            x = self._mlp(layer, layer.mlp, self._normed(hidden, delta, layer.mlp_norm, layer.mlp[0]), len(hidden))
        else:
            x = self._mix_experts(index, self._normed(hidden, delta, layer.mlp_norm, None))
        delta = self._behind(x, layer.down_norm)
        if given is not None:
            hidden += delta
            delta = self._behind(decoder.own_input(layer, hidden, given), layer.input_out_norm)
        if layer.scalar is not None:
            hidden.add_(delta).mul_(layer.scalar)
            return None
        return delta

    def _reader(self, layer: DecoderLayer, rows: int) -> Linear | None:
        """What reads a block's first norm; None where its products take rows in several forms."""
        number, gate = self.dense.number_for, layer.mix_gate
        return layer.qkv if gate is None or number(gate, rows) == number(layer.qkv, rows) else None

    def _mlp(self, layer: DecoderLayer, products: tuple[Linear, Linear], x: Rows, count: int) -> torch.Tensor:
        config, (gate_up, down) = self.decoder.config, products
        activation = Activation(config.activation, config.gated, layer.activation)
        gated = self.dense.gate(gate_up, x, self.dense.number_for(down, count), activation)
        return self.dense.multiply(down, gated)

    def _mix_experts(self, index: int, x: Rows) -> torch.Tensor:
        """What a block's experts give; tokens that only fill up the pass choose none."""
        assert isinstance(x, torch.Tensor)  # no number was asked for
        layer = self.decoder.layers[index]
        shared = None if layer.experts is None else layer.experts.shared
        always = None if shared is None else self._mlp(layer, shared, x, len(x))
        mixed: torch.Tensor = self._mixtures[index](x, self._buffers.drafted, always)
        return mixed

    def _normed(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, norm: torch.Tensor | None, product: Linear | None
    ) -> Rows:
        """Add `delta` to the residual stream in place; what `product` reads of it, in the form that it takes."""
        if norm is None:
            return hidden if delta is None else hidden.add_(delta)
        number = None if product is None else self.dense.number_for(product, len(hidden))
        return self.steps.normed(hidden, delta, norm, self.decoder.config.eps, number)

    def _behind(self, delta: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        """What attention or the MLP gives, behind its norm, times the residual's factor."""
        config = self.decoder.config
        if norm is not None:
            normed = self.steps.normed(delta, None, norm, config.behind_eps)
            assert isinstance(normed, torch.Tensor)  # no number was asked for
            delta = normed
        return delta if config.residual_scale == 1 else delta * config.residual_scale


class BegunPass:
    """Implements `models.base.Begun`."""

    def __init__(
        self, buffers: PinnedBuffers, timing: Timing, cache: DecoderCache, count: int, likeliest: int, is_tree: bool
    ) -> None:
        self._buffers, self._timing, self._cache = buffers, timing, cache
        self._count, self._likeliest, self._is_tree = count, likeliest, is_tree
        self._choices: Choices | None = None

    @property
    def seconds(self) -> float:
        """See `Begun`."""
        return self._timing.seconds

    def fetch(self) -> Choices:
        """See `Begun`."""
        self._cache.advance(self._count)
        return self.bring_over()

    def bring_over(self) -> Choices:
        """Wait for it, and keep its choices: the next pass writes over what they lie in."""
        if self._choices is None:
            with on(self._buffers.position.device):
                self._choices = self._buffers.fetch(self._count, self._likeliest, self._is_tree)
        return self._choices


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
        assert self.growth is not None
        places = position + (torch.arange(len(queries), device=queries.device) if tree is None else tree.depths)
        return queries * self.growth.index_select(0, places)[:, None, None]


def sweeps(decoder: LeanDecoder) -> bool:
    """Whether weights of its blocks come while a pass runs."""
    return not isinstance(decoder.source, AllThere)


def _mixtures(decoder: LeanDecoder) -> dict[int, Any]:
    """The chosen experts of sparse blocks, in Triton's kernels: nothing else has them."""
    if decoder.config.mixture is None:
        return {}
    from quasar_core.models.cuda.mixtures import RoutedExperts

    found = ((index, layer.experts) for index, layer in enumerate(decoder.layers))
    return {index: RoutedExperts(experts) for index, experts in found if experts is not None}


def pass_size(count: int, room: int) -> int:
    """Tokens of the recorded pass that serves `count` of them; where the cache ends too soon for it, `count` itself."""
    size = next(size for size in SIZES if size >= count)
    return size if size <= room else count


def _may_differ(decoder: LeanDecoder, steps: Steps) -> bool:
    """Whether a row's last bits may depend on the rows beside it: in a verifier, and in PyTorch's operations.

    A tree's keys lie in another order than those of the text that it becomes.
    """
    return steps.name != "Triton" or any(True for _ in decoder.packed_layers)


POSITION = 500  # where passes are tried out


def cache_at(decoder: LeanDecoder, length: int) -> DecoderCache:
    """A cache of zeros that stands there."""
    cache: DecoderCache = decoder.new_cache(SHORTEST_BUCKET)
    for states in cache.layers:
        states.zero_()
    cache.advance(length)
    return cache
