"""The lean decoder: RMS norms, rotary grouped-query attention over a KV cache, an MLP, and nothing in between.

It knows tensors and a cache; nothing of files or text. A pass over T tokens is a few operations per layer, whose only
moving part is the cache's length: the cache is allocated once, and rolled back by moving that length. Letters: T
tokens of a pass, L positions that it sees, H key-value heads, G query heads per key-value head, D head size, V
vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch.nn.functional import embedding

from quasar_core.kernels.cpu.rms_norm import rms_norm
from quasar_core.kernels.linear import PackedLinear
from quasar_core.kernels.threads import all_threads, steered
from quasar_core.models.base import CausalLM, Choices, FastPass, choose_best, go_on, in_rows, join_choices
from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.decoder.activations import activated, apply
from quasar_core.models.decoder.attention import attend
from quasar_core.models.decoder.cache import DecoderCache
from quasar_core.models.decoder.heads import Turn, normed, split_heads
from quasar_core.models.decoder.hidden_rows import HiddenRows, LastRow
from quasar_core.models.decoder.known_tokens import spread
from quasar_core.models.decoder.layer import DecoderLayer, FusedLinear, Joint, LayerInputs, Linear
from quasar_core.models.decoder.layer_source import AllThere, LayerSource
from quasar_core.models.decoder.places import Place, Places
from quasar_core.models.decoder.two_tables import AnyCache, TwoTableCache, runs_of
from quasar_core.models.recurrent.states import LayerStates
from quasar_core.models.rope import RopeTables

LONGEST_TREE = 32  # nodes, in PyTorch's operations


class LeanDecoder(CausalLM):
    """A pass over a prompt is a few PyTorch operations per layer; the passes of decoding are the fast pass's."""

    def __init__(
        self,
        config: DecoderConfig,
        embedding: torch.Tensor,
        layers: Sequence[DecoderLayer],
        norm: torch.Tensor,
        head: Linear,
        ropes: Sequence[RopeTables],
        inputs: LayerInputs | None = None,
        joint: Joint | None = None,
    ) -> None:
        self.config, self.embedding, self.layers = config, embedding, tuple(layers)
        self.norm, self.head, self.ropes, self.inputs = norm, head, tuple(ropes), inputs
        self.joint = joint  # of a head that goes on from another model's rows
        self.head_tokens: torch.Tensor | None = None  # [R] int32: whose logits the head gives; None for all
        self.keeps_rows = False  # whether its caches keep the rows that the head reads
        self.fast: FastPass | None = None  # runs the passes of decoding, where there is one
        self.source: LayerSource = AllThere(len(self.layers))
        self._places = Places(config, self.ropes, embedding.device, embedding.dtype)
        rounded = torch.tensor(config.embedding_scale, dtype=embedding.dtype).item()
        self.embedding_scale = rounded if config.rounds_embedding_scale else config.embedding_scale

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.config.vocab_size

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of a forward pass."""
        return self.embedding.dtype

    @property
    def packed_layers(self) -> Iterator[PackedLinear]:
        """Linear layers on packed codes; none in a target."""
        for product in (*(product for layer in self.layers for product in layer.linears), self.head):
            parts = product.parts if isinstance(product, FusedLinear) else (product,)
            yield from (part for part in parts if isinstance(part, PackedLinear))

    @property
    def switches_at(self) -> int | None:
        """The length of texts beyond which all of a text is rotated by another table; None where no text is."""
        rope = self.config.ropes[0]
        return rope.limit if rope.switches else None

    def new_cache(self, capacity: int) -> Any:
        """A cache for this model, and for any model of the same shape."""
        limit = self.switches_at
        if limit is None or capacity <= limit:
            return self._one_cache(capacity)
        write = partial(self._plain_pass, last_only=True)
        return TwoTableCache(self._one_cache(limit), self._one_cache(capacity), limit, write)

    def _one_cache(self, capacity: int) -> DecoderCache:
        for rope in self.ropes:
            rope.reach(capacity)
        recurrences = [layer.recurrence for layer in self.layers]
        cache = DecoderCache(self.config.blocks, capacity, self.device, self.dtype, recurrences)
        cache.limit = self.ropes[0].limit
        if self.keeps_rows:
            cache.rows = HiddenRows(capacity, self.config.hidden_size, self.device, self.dtype)
        if self.joint is not None:
            cache.rows = LastRow(self.config.hidden_size, self.device, self.dtype)
        return cache

    @property
    def streamed(self) -> str | None:
        """See `models/base.py`."""
        return self.source.streamed

    @property
    def longest_tree(self) -> int:
        """Nodes of a tree that passes at once; 0 where none does."""
        if self.why_chains is not None:
            return 0
        return LONGEST_TREE if self.fast is None else self.fast.longest_tree

    @property
    def why_chains(self) -> str | None:
        """See `models/base.py`."""
        if self.switches_at is not None:
            return f"rotations change at {self.switches_at} tokens, and a tree may stand on both sides"
        return "the states of recurrent layers follow one text" if self.config.is_recurrent else None

    @steered
    def forward_tree(self, tokens: Sequence[int], parents: Sequence[int], cache: DecoderCache) -> torch.Tensor:
        """See `models/base.py`."""
        cache.check_room(len(tokens))
        if self.fast is None:
            return self._plain_pass(tokens, cache, last_only=False, parents=parents)
        return self.fast.run(tokens, cache, parents)

    @steered
    def choose_tree(
        self, tokens: Sequence[int], parents: Sequence[int], cache: DecoderCache, likeliest: int = 0
    ) -> Choices:
        """See `models/base.py`."""
        cache.check_room(len(tokens))
        if self.fast is None:
            return choose_best(self._plain_pass(tokens, cache, last_only=False, parents=parents), likeliest)
        return self.fast.choose(tokens, cache, likeliest, parents=parents)

    @steered
    def forward(self, tokens: Sequence[int], cache: AnyCache, last_only: bool = False) -> torch.Tensor:
        """One pass of T tokens → float32 logits [T, V] ([1, V] with `last_only`, as of a prompt).

        The fast pass takes any number of tokens, in parts: what decoding writes depends on no limit of its own.
        """
        cache.check_room(len(tokens))
        rows = [self._forward(run, one, last_only) for run, one in runs_of(tokens, cache)]
        return rows[-1] if last_only or len(rows) == 1 else torch.cat(rows)

    def _forward(self, tokens: Sequence[int], cache: DecoderCache, last_only: bool) -> torch.Tensor:
        if self.fast is None or last_only:
            return self._plain_pass(tokens, cache, last_only)
        parts = [self.fast.run(part, cache) for part in in_rows(tokens, self.fast.longest)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @steered
    def choose(self, tokens: Sequence[int], cache: AnyCache, likeliest: int = 0) -> Choices:
        """One pass → the best token of each row, its margin, and so many `likeliest` tokens."""
        cache.check_room(len(tokens))
        return join_choices([self._choose(run, one, likeliest) for run, one in runs_of(tokens, cache)])

    def _choose(self, tokens: Sequence[int], cache: DecoderCache, likeliest: int) -> Choices:
        if self.fast is None:
            return choose_best(self._plain_pass(tokens, cache, last_only=False), likeliest)
        return join_choices([self.fast.choose(part, cache, likeliest) for part in in_rows(tokens, self.fast.longest)])

    def pass_prompt(
        self, tokens: Sequence[int], cache: AnyCache, chunk: int, before_pass: Callable[[], None] = go_on
    ) -> torch.Tensor:
        """See `models/base.py`. A prompt that is short is one fast pass; a longer one has none, whatever its end.

        Where weights are fetched for every pass, they are for all chunks at once.
        """
        if isinstance(cache, TwoTableCache):
            return super().pass_prompt(tokens, cache, chunk, before_pass)
        if self.fast is not None and len(tokens) <= self.fast.longest_prompt:
            before_pass()
            return self._short_prompt(tokens, cache)
        if self.streamed is None:
            return super().pass_prompt(tokens, cache, chunk, before_pass)
        cache.check_room(len(tokens))
        return self._sweep(in_rows(tokens, chunk), cache, before_pass)

    @steered
    def _short_prompt(self, tokens: Sequence[int], cache: DecoderCache) -> torch.Tensor:
        assert self.fast is not None
        cache.check_room(len(tokens))
        return self.fast.run(tokens, cache, last_only=True)

    def plain_logits(self, tokens: Sequence[int], cache: DecoderCache) -> torch.Tensor:
        """One pass in PyTorch's operations, whatever fast pass there is → float32 logits [T, V]."""
        return self._plain_pass(tokens, cache, last_only=False)

    @torch.inference_mode()
    def _plain_pass(
        self, tokens: Sequence[int], cache: DecoderCache, last_only: bool, parents: Sequence[int] | None = None
    ) -> torch.Tensor:
        place = self._places.place(cache.length, len(tokens), cache.prompt_length, parents)
        hidden, inputs = self.embed(torch.tensor(tokens, device=self.device))
        if self.joint is not None:
            assert cache.given is not None
            hidden = self.joint(hidden, cache.given[place.start : place.end], self.config.eps)
        for layers in self.source.stretches():
            for index in layers:
                self._run_layer(index, hidden, inputs[index], cache, place)
        self._keep_rows(hidden, cache, place.start)
        cache.advance(len(tokens))
        return self.head_logits(hidden[-1:] if last_only else hidden)

    @all_threads()
    @torch.inference_mode()
    def _sweep(self, parts: Sequence[Sequence[int]], cache: DecoderCache, before: Callable[[], None]) -> torch.Tensor:
        """Passes one behind another, each block of all of them before the next block → float32 logits [1, V]."""
        starts = [cache.length, *(cache.length + end for end in accumulate(map(len, parts)))]
        embedded = [self.embed(torch.tensor(part, device=self.device)) for part in parts]
        for layers in self.source.stretches():
            for index in layers:
                for start, (hidden, inputs) in zip(starts, embedded, strict=False):
                    before()
                    place = self._places.place(start, len(hidden), cache.prompt_length)
                    self._run_layer(index, hidden, inputs[index], cache, place)
        for start, (hidden, _) in zip(starts, embedded, strict=False):
            self._keep_rows(hidden, cache, start)
        cache.advance(starts[-1] - cache.length)
        return self.head_logits(embedded[-1][0][-1:])

    def _run_layer(
        self, index: int, hidden: torch.Tensor, given: torch.Tensor | None, cache: DecoderCache, place: Place
    ) -> None:
        """Add to the residual stream what a block gives."""
        layer, states = self.layers[index], cache.states[index]

        def mix(x: torch.Tensor) -> torch.Tensor:
            if states is None:
                return self._attention(layer, x, cache.layers[index], place)
            return self._recur(layer, x, states, place.start)

        self.run_block(layer, hidden, given, mix)

    def run_block(
        self,
        layer: DecoderLayer,
        hidden: torch.Tensor,
        given: torch.Tensor | None,
        mix: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Add to the residual stream [T, in] what a block gives; `mix` is its attention, or what stands in its place.

        `given` [T, P] is the block's own input, where it has one.
        """
        self._add(hidden, mix(self._normed(hidden, layer.input_norm)), layer.out_norm)
        x = self._normed(hidden, layer.mlp_norm)
        self._add(hidden, self._mlp(layer, x, hidden), layer.down_norm)
        if given is not None:
            self._add(hidden, self.own_input(layer, hidden, given), layer.input_out_norm)
        if layer.scalar is not None:
            hidden *= layer.scalar

    def _keep_rows(self, hidden: torch.Tensor, cache: DecoderCache, start: int) -> None:
        """Keep what the head reads of the residual stream [T, in] of a pass at `start`, where the cache wants it."""
        if cache.rows is not None:
            cache.rows.place(start, len(hidden)).copy_(self._normed(hidden, self.norm))
            cache.rows.mark(start, len(hidden))

    def head_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits [T, V] of the residual stream [T, in] behind the last block."""
        logits = self.logits(self.head(self._normed(hidden, self.norm))).float()
        return logits if self.head_tokens is None else spread(logits, self.head_tokens, self.vocab_size)

    def embed(self, tokens: torch.Tensor) -> tuple[torch.Tensor, Sequence[torch.Tensor | None]]:
        """The embeddings of T tokens [T, in], and the input [T, P] that each block has of its own, or None."""
        hidden = embedding(tokens, self.embedding)
        if self.embedding_scale != 1:
            hidden *= self.embedding_scale
        if self.config.norms_embedding:
            hidden = rms_norm(hidden, None, self.config.eps)
        if self.inputs is None:
            return hidden, [None] * len(self.layers)
        return hidden, self.inputs(tokens, hidden, self.config.eps).unbind()

    def own_input(self, layer: DecoderLayer, hidden: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """What a block makes of its own input [T, P], by a gate of the residual stream [T, in] → [T, in]."""
        assert layer.input_gate is not None
        assert layer.input_out is not None
        return layer.input_out(apply(layer.input_gate(hidden), self.config.activation) * given)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor | None, eps: float | None = None) -> torch.Tensor:
        return x if weight is None else normed(x, weight, self.config.eps if eps is None else eps)

    def _add(self, hidden: torch.Tensor, delta: torch.Tensor, norm: torch.Tensor | None) -> None:
        """Add what attention or the MLP gives, behind its norm, to the residual stream in place."""
        hidden.add_(self._normed(delta, norm, self.config.behind_eps), alpha=self.config.residual_scale)

    def _attention(self, layer: DecoderLayer, x: torch.Tensor, states: torch.Tensor, place: Place) -> torch.Tensor:
        """Write the pass's keys and values into the layer's states [2, H, capacity, D], and attend over them."""
        config, shape = self.config, layer.shape
        tables = None if shape.rope is None else place.tables[shape.rope]
        queries, keys, values, gates = self.project(layer, x, tables, place.growth)
        if keys is not None and values is not None:
            states[0, :, place.start : place.end] = keys.transpose(0, 1)
            states[1, :, place.start : place.end] = values.transpose(0, 1)
        mask = place.masks[shape.window, shape.sinks, shape.kv_heads, shape.head_size]
        return self.finish(layer, attend(queries, states, mask, config.scores_scale, config.scores_cap), gates)

    def project(
        self,
        layer: DecoderLayer,
        x: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor] | None,
        growth: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Queries [T, H·G, D], keys and values [T, H, D] as the cache has them, and what gates the mix [T, H·G·D].

        Keys and values are None where they are an earlier block's.
        """
        gated_heads = self.config.num_heads if self.config.gates_attention else 0
        heads, gates = split_heads(layer.qkv(x), layer.shape.head_size, gated_heads)
        gates = gates if layer.mix_gate is None else layer.mix_gate(x)
        turn, own = self.turn(layer), layer.shape.kv_heads
        keys = values = None
        if layer.shares:
            queries = turn(heads, tables)
        else:
            queries, keys = turn(heads[:, :-own], tables).split([self.config.num_heads, own], 1)
            values = turn.values(heads[:, -own:])
        return queries if growth is None else queries * growth, keys, values, gates

    def finish(self, layer: DecoderLayer, mixed: torch.Tensor, gates: torch.Tensor | None) -> torch.Tensor:
        """What attention adds [T, in], of the heads' mixes [T, H·G·D] and what gates them."""
        return layer.out(mixed if gates is None else mixed * gates.sigmoid())

    def _recur(self, layer: DecoderLayer, x: torch.Tensor, states: LayerStates, start: int) -> torch.Tensor:
        assert layer.recurrence is not None
        rates = None if layer.rates is None else layer.rates(x)
        return layer.out(layer.recurrence(layer.qkv(x), rates, states, start))

    def turn(self, layer: DecoderLayer) -> Turn:
        """How a layer norms and rotates its queries and keys."""
        config = self.config
        rope = None if layer.shape.rope is None else config.ropes[layer.shape.rope]
        return Turn(config.num_heads, config.head_norms, layer.head_norms, rope, config.eps, layer.shares)

    def _mlp(self, layer: DecoderLayer, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """What the MLP adds for x, the normed residual stream [T, in]; experts beside an MLP read the stream itself."""
        config, experts = self.config, layer.experts
        if experts is not None and experts.beside is None:
            return experts(x, config.activation)
        gate_up, down = layer.mlp
        y = down(activated(gate_up(x), config.activation, config.gated, layer.activation))
        if experts is None or experts.beside is None:
            return y
        return experts.beside.join(experts, y, hidden, config.activation, config.eps)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """What the head's outputs make as logits: scaled, and held below the soft cap, where there are such."""
        config = self.config
        if config.logits_scale != 1:
            x = x * config.logits_scale
        return x if config.logits_cap is None else torch.tanh(x / config.logits_cap) * config.logits_cap
