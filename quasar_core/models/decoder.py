"""The lean decoder: RMS norms, rotary grouped-query attention over a KV cache, a gated MLP, and nothing in between.

It knows tensors and a cache; nothing of files or text. A pass over T tokens is a few operations per layer, whose only
moving part is the cache's length: the cache is allocated once, and rolled back by moving that length. Letters: T
tokens of a pass, L positions that it sees, H key-value heads, G query heads per key-value head, D head size, V
vocabulary.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

from quasar_core.errors import QuasarError
from quasar_core.kernels.cpu.huge_pages import empty_in_huge_pages
from quasar_core.kernels.linear import PackedLinear
from quasar_core.kernels.threads import steered
from quasar_core.models.architectures import DecoderConfig
from quasar_core.models.base import CausalLM, Choices, FastPass, choose_best, join_choices
from quasar_core.models.rope import PromptLength, RopeTables

# Up to here the query heads of a group are rows of one product, so that keys and values are read once for all of them.
FOLDED_TOKENS = 32


@dataclass(frozen=True)
class AttentionMask:
    """Which positions the tokens of a pass attend to: from `first` to `end`, less what `added` takes away."""

    first: int
    end: int
    causal: bool  # a prompt from position 0, which needs no mask
    added: torch.Tensor | None  # to the scores: 0 or −∞, [T, L], or [T·G, L] for folded groups


def make_mask(
    start: int, count: int, window: int | None, group: int, device: torch.device, dtype: torch.dtype
) -> AttentionMask:
    """Make the mask of `count` tokens at position `start`; a window counts the token's own position."""
    end = start + count
    first = 0 if window is None else max(0, start - window + 1)
    if count == 1:
        return AttentionMask(first, end, causal=False, added=None)
    if start == 0 and (window is None or count <= window):
        return AttentionMask(first, end, causal=True, added=None)
    if device.type == "cuda" and window is None and count > FOLDED_TOKENS:
        # A later chunk of a prompt. Flash attention takes no tensor for a mask, but it takes "causal, and the last
        # query sees the last key", which is what this one says.
        return AttentionMask(0, end, causal=False, added=causal_lower_right(count, end))
    own = torch.arange(start, end, device=device)[:, None]
    seen = torch.arange(first, end, device=device)
    hidden = seen > own
    if window is not None:
        hidden |= seen <= own - window
    added = torch.zeros(hidden.shape, device=device, dtype=dtype).masked_fill_(hidden, -torch.inf)
    return AttentionMask(
        first, end, causal=False, added=added.repeat_interleave(group, 0) if count <= FOLDED_TOKENS else added
    )


def attend(queries: torch.Tensor, states: torch.Tensor, mask: AttentionMask) -> torch.Tensor:
    """Queries [T, H·G, D] over a layer's keys and values [2, H, capacity, D] → [T, H·G·D]."""
    keys, values = states[:, None, :, mask.first : mask.end].unbind()
    count, heads, size = queries.shape
    if mask.causal or count > FOLDED_TOKENS:
        mixed = scaled_dot_product_attention(
            queries.transpose(0, 1)[None],
            keys,
            values,
            attn_mask=mask.added,
            is_causal=mask.causal,
            enable_gqa=heads != keys.shape[1],
        )
        return mixed[0].transpose(0, 1).reshape(count, -1)
    groups = queries.view(count, keys.shape[1], -1, size)  # [T, H, G, D]
    rows = groups.transpose(0, 1).reshape(1, keys.shape[1], -1, size)  # [1, H, T·G, D]
    mixed = scaled_dot_product_attention(rows, keys, values, attn_mask=mask.added)
    return mixed.view(keys.shape[1], count, -1, size).transpose(0, 1).reshape(count, -1)


class DecoderCache(PromptLength):
    """Implements `models.base.KVCache`; a layer is one tensor [2, H, capacity, D], keys before values.

    The positions of a head lie next to each other, so attention reads it from end to end.
    """

    def __init__(
        self, num_layers: int, num_heads: int, head_size: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (num_layers, 2, num_heads, capacity, head_size)
        self.layers = empty_in_huge_pages(*shape, device=device, dtype=dtype).unbind()
        self.addresses = (ctypes.c_void_p * num_layers)(*(states.data_ptr() for states in self.layers))
        self._length, self._capacity = 0, capacity

    @property
    def length(self) -> int:
        """Positions written."""
        return self._length

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return self._capacity

    def check_room(self, count: int) -> None:
        """Refuse a pass that would not fit."""
        if self._length + count > self._capacity:
            raise QuasarError(f"The cache holds {self._capacity} tokens, and {self._length + count} are needed.")

    def advance(self, count: int) -> None:
        """Count a finished pass of `count` positions."""
        self._length += count

    def rollback(self, length: int) -> None:
        """Move the length back; a length ahead of what is written is a defect of the caller."""
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot move a cache of {self._length} positions to {length}")
        self._length = length


Linear = Callable[[torch.Tensor], torch.Tensor]  # [T, in] → [T, out]


@dataclass(frozen=True)
class DenseLinear:
    """A linear layer of 16 or 32 bits: weight [out, in], bias [out]."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] → [T, out]."""
        return linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class FusedLinear:
    """Linear layers of one input as one layer; each keeps its own weight, such as packed ones of different widths."""

    parts: tuple[Linear, ...]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] → [T, sum of out]."""
        return torch.cat([part(x) for part in self.parts], dim=-1)


@dataclass(frozen=True)
class DecoderLayer:
    """Weights and switches of one block."""

    input_norm: torch.Tensor
    qkv: Linear  # the queries of all heads, then keys, then values
    head_norms: torch.Tensor | None  # [H·G + H, D], of the queries' heads, then of the keys'
    out: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear  # gates, then what they gate
    down: Linear
    window: int | None
    rotates: bool

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The four products."""
        return self.qkv, self.out, self.gate_up, self.down


@dataclass(frozen=True)
class _Place:
    """Where a pass stands: its positions, their rotations, and what each kind of layer sees."""

    start: int
    end: int
    cos: torch.Tensor
    sin: torch.Tensor
    masks: dict[int | None, AttentionMask]


class LeanDecoder(CausalLM):
    """A pass over a prompt is a few PyTorch operations per layer; the passes of decoding are the fast pass's."""

    def __init__(
        self,
        config: DecoderConfig,
        embedding: torch.Tensor,
        layers: Sequence[DecoderLayer],
        norm: torch.Tensor,
        head: Linear,
        rope: RopeTables,
    ) -> None:
        self.config, self.embedding, self.layers = config, embedding, tuple(layers)
        self.norm, self.head, self.rope = norm, head, rope
        self.fast: FastPass | None = None  # runs the passes of decoding, where there is one
        self._windows = frozenset(config.windows)
        self._group = config.num_heads // config.num_kv_heads
        self._rotated_heads = config.num_heads + config.num_kv_heads

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

    def new_cache(self, capacity: int) -> DecoderCache:
        """A cache for this model, and for any model of the same shape."""
        self.rope.reach(capacity)
        config = self.config
        cache = DecoderCache(
            config.num_layers, config.num_kv_heads, config.head_size, capacity, self.device, self.dtype
        )
        cache.limit = self.rope.limit
        return cache

    @steered
    def forward(self, tokens: Sequence[int], cache: DecoderCache, last_only: bool = False) -> torch.Tensor:
        """One pass of T tokens → float32 logits [T, V] ([1, V] with `last_only`, as of a prompt).

        The fast pass takes any number of tokens, in parts: what decoding writes depends on no limit of its own.
        """
        cache.check_room(len(tokens))
        if self.fast is None or last_only:
            return self._plain_pass(tokens, cache, last_only)
        parts = [self.fast.run(part, cache) for part in _parts(tokens, self.fast.longest)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @steered
    def choose(self, tokens: Sequence[int], cache: DecoderCache) -> Choices:
        """One pass, and the best token of each row with its margin."""
        cache.check_room(len(tokens))
        if self.fast is None:
            return choose_best(self._plain_pass(tokens, cache, last_only=False))
        return join_choices([self.fast.choose(part, cache) for part in _parts(tokens, self.fast.longest)])

    @torch.inference_mode()
    def _plain_pass(self, tokens: Sequence[int], cache: DecoderCache, last_only: bool) -> torch.Tensor:
        place = self._place(cache, len(tokens))
        hidden = embedding(torch.tensor(tokens, device=self.device), self.embedding)
        for layer, states in zip(self.layers, cache.layers, strict=True):
            hidden += self._attention(layer, self._normed(hidden, layer.input_norm), states, place)
            hidden += self._mlp(layer, self._normed(hidden, layer.mlp_norm))
        cache.advance(len(tokens))
        if last_only:
            hidden = hidden[-1:]
        return self.head(self._normed(hidden, self.norm)).float()

    def _place(self, cache: DecoderCache, count: int) -> _Place:
        start = cache.length
        cos, sin = self.rope.rows(start, start + count, cache.prompt_length)
        masks = {w: make_mask(start, count, w, self._group, self.device, self.dtype) for w in self._windows}
        return _Place(start, start + count, cos, sin, masks)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight.shape, weight, self.config.eps)

    def _attention(self, layer: DecoderLayer, x: torch.Tensor, states: torch.Tensor, place: _Place) -> torch.Tensor:
        """Write the pass's keys and values into the layer's states [2, H, capacity, D], and attend over them."""
        heads = layer.qkv(x).view(x.shape[0], -1, self.config.head_size)  # [T, H·G + 2·H, D]
        self._rotate(layer, heads[:, : self._rotated_heads], place)
        written = heads[:, self.config.num_heads :].unflatten(1, (2, -1))  # [T, 2, H, D]
        states[:, :, place.start : place.end] = written.permute(1, 2, 0, 3)
        return layer.out(attend(heads[:, : self.config.num_heads], states, place.masks[layer.window]))

    def _rotate(self, layer: DecoderLayer, heads: torch.Tensor, place: _Place) -> None:
        """Norm and rotate queries and keys [T, H·G + H, D] in place, as the layer has it."""
        size = self.config.head_size
        x = heads
        if layer.head_norms is not None:
            x = rms_norm(heads, (size,), None, self.config.eps) * layer.head_norms
        if layer.rotates:
            torch.addcmul(x * place.cos, x.roll(size // 2, -1), place.sin, out=heads)
        elif layer.head_norms is not None:
            heads.copy_(x)

    def _mlp(self, layer: DecoderLayer, x: torch.Tensor) -> torch.Tensor:
        gate, up = layer.gate_up(x).chunk(2, dim=-1)
        return layer.down(silu(gate) * up)


def _parts(tokens: Sequence[int], longest: int) -> Iterator[Sequence[int]]:
    """The tokens in order, at most `longest` at a time."""
    return (tokens[begin : begin + longest] for begin in range(0, len(tokens), longest))
