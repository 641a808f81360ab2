"""Hold the bfloat16 weights of decoders in 12 bits each, without loss, where passes in C++ read them so.

A pass of a few tokens takes as long as its weights take from memory, so a quarter fewer bytes are a quarter less time,
and the weights as they were need not stay. `kernels/cpu/compressed.py` says how; each product is that of the weights as
they were, to the last bit. PyTorch's operations, which read prompts, restore a layer's weight when they come to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from quasar_core.kernels.cpu import library as cpp
from quasar_core.kernels.cpu.compressed import BITS, CompressedWeight
from quasar_core.models.cpu import cpu_pass
from quasar_core.models.decoder.layer import CompressedLinear, DecoderLayer, DenseLinear, FusedLinear, Linear
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.records import Progress, no_progress

SMALLEST = 64 << 20  # bytes of weights below which they may lie in the processor's caches


def compress(decoders: Sequence[LeanDecoder], wanted: bool | None, progress: Progress = no_progress) -> str | None:
    """Compress what decoders hold in bfloat16, each weight once; a note of what it saves, or why it is not done.

    With None where it is measured to be faster; None is returned where nothing is to be said.
    """
    if wanted is False:
        return None
    reason = _why_not(decoders)
    if reason:
        return f"weights: as they are, since {reason}" if wanted else None
    if not wanted and not _is_faster(decoders):
        return None
    compressing = _Compressing(progress, sum(len(_dense(decoder)) for decoder in decoders))
    for decoder in decoders:
        decoder.layers = tuple(compressing.layer(layer) for layer in decoder.layers)
        decoder.head = compressing.product(decoder.head)
        if decoder.joint is not None:
            decoder.joint = replace(decoder.joint, projection=compressing.product(decoder.joint.projection))
    before, after = compressing.before / 1e6, compressing.after / 1e6
    return f"weights: bfloat16 in {BITS} bits each, without loss; a pass reads {after:,.0f} MB of {before:,.0f}"


def saved_bytes(decoder: LeanDecoder) -> int:
    """How many bytes fewer a pass over all of a decoder's weights reads."""
    weights = [product.weight for product in _parts(decoder) if isinstance(product, CompressedLinear)]
    return sum(2 * weight.in_features * weight.out_features - weight.nbytes for weight in weights)


def _why_not(decoders: Sequence[LeanDecoder]) -> str | None:
    if not decoders:
        return "transformers runs the model"
    for decoder in decoders:
        if decoder.device.type != "cpu":
            return f"compressed ones are for a CPU, and these are on {decoder.device.type}"
        if decoder.dtype != torch.bfloat16:
            return f"only bfloat16 is compressed, and these are {str(decoder.dtype).removeprefix('torch.')}"
        if decoder.streamed:
            return "some are streamed"
        reason = cpu_pass.why_not(decoder)
        if reason:
            return f"the C++ pass does not run them: {reason}"
    return None


def _is_faster(decoders: Sequence[LeanDecoder]) -> bool:
    """Not in tiles, by docs/results/: a pass gains a twelfth there, and prompts take up to a third longer."""
    size = sum(weight.nbytes for decoder in decoders for weight in _dense(decoder))
    return size >= SMALLEST and cpp.multiplies_bfloat16() and not cpp.multiplies_in_tiles()


def _dense(decoder: LeanDecoder) -> list[torch.Tensor]:
    return [part.weight for part in _parts(decoder) if isinstance(part, DenseLinear)]


def _parts(decoder: LeanDecoder) -> list[Linear]:
    products = [*(product for layer in decoder.layers for product in layer.linears), decoder.head]
    products += [] if decoder.joint is None else [decoder.joint.projection]
    return [part for one in products for part in (one.parts if isinstance(one, FusedLinear) else (one,))]


@dataclass
class _Compressing:
    """What was compressed so far: layers that decoders share stay shared."""

    progress: Progress
    total: int
    before: int = 0
    after: int = 0

    def __post_init__(self) -> None:
        self._known: dict[tuple[int, torch.Size], CompressedWeight] = {}
        self._done = 0

    def layer(self, layer: DecoderLayer) -> DecoderLayer:
        """A block whose products are compressed; the weights as they were go with the last block that has them."""
        names = ("qkv", "rates", "mix_gate", "out", "gate_up", "down", "input_gate", "input_out")
        products: dict[str, Any] = {
            name: self.product(product) for name in names if (product := getattr(layer, name)) is not None
        }
        experts = layer.experts
        if experts is not None:
            gate_up, down = (tuple(map(self.product, some)) for some in (experts.gate_up, experts.down))
            experts = replace(experts, gate_up=gate_up, down=down)
        return replace(layer, **products, experts=experts)

    def product(self, product: Linear) -> Linear:
        """A product in 12 bits where it is one of bfloat16; others as they are."""
        if isinstance(product, FusedLinear):
            return FusedLinear(tuple(map(self.product, product.parts)))
        if not isinstance(product, DenseLinear):
            return product
        weight = product.weight
        key = (weight.data_ptr(), weight.shape)
        self.progress("compressing weights", self._done, self.total)
        self._done += 1
        if key not in self._known:
            self._known[key] = CompressedWeight.of(weight)
            self.before += weight.nbytes
            self.after += self._known[key].nbytes
        return CompressedLinear(self._known[key], product.bias)
