"""A decoder with some of its blocks left out, over the whole decoder's own cache."""

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from quasar_core.kernels.linear import PackedLinear
from quasar_core.models.decoder.cache import DecoderCache
from quasar_core.models.decoder.layer import CompressedLinear, DecoderLayer, DenseLinear, FusedLinear, Linear
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.store.measured import Measured, measured_file
from quasar_core.system import package_version
from quasar_core.typed import build

TEXT = 128  # tokens that blocks are compared on
MOST_DRAFTED = 15
WORTH = 1.03  # tokens a pass, of plain decoding's: what is expected is not known better


class CacheView(DecoderCache):
    """Some layers of a cache, with a length of its own: what is written through it is written over by the next pass."""

    def __init__(self, whole: DecoderCache, kept: Sequence[int]) -> None:
        self._source, self.limit = whole, whole.limit
        self.layers, self.states = [whole.layers[i] for i in kept], [whole.states[i] for i in kept]
        self.addresses = (ctypes.c_void_p * len(kept))(*(states.data_ptr() for states in self.layers))
        self._capacity = whole.capacity
        self.move(whole.length)

    def move(self, length: int) -> None:
        """Stand at `length`, up to which the whole cache and this view of it hold the text."""
        self._length, self.prompt_length = length, self._source.prompt_length

    def _stand_at(self, length: int) -> None:
        self._length = length  # the states stand where the whole cache does


def skip_layers(decoder: LeanDecoder, kept: Sequence[int]) -> LeanDecoder:
    """The decoder of the `kept` blocks, over the same weights; without a fast pass."""
    config = decoder.config
    some = replace(
        config,
        num_layers=len(kept),
        blocks=tuple(replace(config.blocks[i], states_of=place) for place, i in enumerate(kept)),
    )
    layers = [decoder.layers[i] for i in kept]
    return LeanDecoder(some, decoder.embedding, layers, decoder.norm, decoder.head, decoder.ropes)


def share_of_weights(decoder: LeanDecoder, kept: Sequence[int]) -> float:
    """The share of the decoder's weights that a pass of the `kept` blocks and the head reads."""
    blocks = [bytes_read(layer) for layer in decoder.layers]
    head = bytes_of(decoder.head)
    return (sum(blocks[i] for i in kept) + head) / (sum(blocks) + head)


def bytes_read(layer: DecoderLayer) -> float:
    """Bytes of the weights that a pass of one token reads: of experts the chosen ones' alone."""
    total = float(sum(map(bytes_of, layer.linears)))
    if layer.experts is None:
        return total
    experts = sum(map(bytes_of, layer.experts.linears))
    return total - experts * (1 - layer.experts.config.places / layer.experts.config.experts)


def bytes_of(product: Linear) -> int:
    """Bytes of a linear layer's weights, scales aside."""
    if isinstance(product, FusedLinear):
        return sum(bytes_of(part) for part in product.parts)
    if isinstance(product, PackedLinear):
        return product.in_features * product.out_features * product.bits // 8
    if isinstance(product, CompressedLinear):
        return product.weight.nbytes
    assert isinstance(product, DenseLinear)
    return product.weight.numel() * product.weight.element_size()


# Which blocks to keep


def expected_speed(agreement: float, ratio: float) -> float:
    """Tokens a pass at the best length of drafts whose tokens are right so often and cost `ratio` passes each."""
    lengths = range(MOST_DRAFTED + 1)
    return max(sum(agreement**i for i in range(k + 1)) / (1 + k * ratio) for k in lengths)


@torch.inference_mode()
def choose_layers(decoder: LeanDecoder, text: Sequence[int]) -> tuple[int, ...]:
    """The blocks to keep (Zhang et al., 2024, choose theirs by a search): those of the best expected speed, if it pays.

    One pass without each block says how many of the decoder's own choices over `text` survive; blocks are then left
    out one more at a time, the least missed first. That takes two passes a block.
    """
    every = range(len(decoder.layers))
    own = _choices(decoder, text)

    def agreement(kept: Sequence[int]) -> float:
        return float((_choices(skip_layers(decoder, kept), text) == own).float().mean())

    missed = {i: agreement([other for other in every if other != i]) for i in every}
    order = sorted(every, key=lambda i: (-missed[i], i))
    sets = [tuple(sorted(order[count:])) for count in range(1, len(every))]
    speeds = {kept: expected_speed(agreement(kept), share_of_weights(decoder, kept)) for kept in sets}
    best = max(sets, key=lambda kept: speeds[kept])
    return best if speeds[best] > WORTH else ()


def _choices(decoder: LeanDecoder, text: Sequence[int]) -> torch.Tensor:
    cache = decoder.new_cache(len(text))
    return decoder.plain_logits(text, cache).argmax(dim=-1)


@torch.inference_mode()
def own_text(decoder: LeanDecoder, first: int, count: int = TEXT) -> list[int]:
    """A text that the decoder draws from its own distribution, always the same one."""
    cache, tokens = decoder.new_cache(count), [first]
    generator = torch.Generator().manual_seed(0)
    while len(tokens) < count:
        logits = decoder.forward(tokens[-1:], cache)[-1].cpu()
        tokens.append(int(torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)))
    return tokens


def remembered_layers(decoder: LeanDecoder, fingerprint: str | None, role: str) -> tuple[tuple[int, ...], str]:
    """The blocks to keep of a model with these files, chosen once; and how that is known."""
    conditions = {"model": fingerprint or "", "role": role, "quasar": package_version("quasar-cli")}
    kept = Measured(measured_file("layers", conditions), conditions, _parse) if fingerprint else None
    known = kept.get("kept") if kept else None
    if known and max(known.value, default=0) < len(decoder.layers):
        return tuple(known.value), "remembered"
    chosen = choose_layers(decoder, own_text(decoder, 0))
    if kept:
        kept.keep({"kept": list(chosen)})
    return chosen, f"chosen now{f', {kept.trouble}' if kept and kept.trouble else ''}"


def _parse(value: Any) -> list[int]:
    layers = build(list[int], value)
    if layers != sorted(set(layers)) or min(layers, default=0) < 0:
        raise ValueError("no layers")
    return layers
