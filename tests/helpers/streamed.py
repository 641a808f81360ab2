"""Decoders whose blocks are streamed from files, and passes that tell whether they compute the same."""

from collections.abc import Iterable
from pathlib import Path

import torch
from helpers.decoder_cases import CPU, FLOAT

from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.memory.offload import movable_products
from quasar_core.models.weights.lean_weights import load_target
from quasar_core.models.weights.streaming import LayerStream


def streamed(folder: Path, blocks: Iterable[int], dtype: torch.dtype = FLOAT) -> LeanDecoder:
    """The model of a folder, whose products in these blocks are fetched for every pass."""
    movable, _ = movable_products(folder, None)
    return load_target(folder, CPU, dtype, streamed={block: movable[block] for block in blocks})


def source_of(decoder: LeanDecoder) -> LayerStream:
    """The stream that a decoder reads its blocks from."""
    assert isinstance(decoder.source, LayerStream)
    return decoder.source


def passes(decoder: LeanDecoder, tokens: list[int]) -> list[torch.Tensor]:
    """A prompt in three chunks, passes of several tokens and of one, and a pass over a tree."""
    cache = decoder.new_cache(len(tokens) + 8)
    found = [decoder.pass_prompt(tokens[:20], cache, 8)]
    for begin, end in ((20, 27), (27, 28), (28, len(tokens))):
        found.append(decoder.forward(tokens[begin:end], cache))
    found.append(decoder.forward_tree(tokens[:3], [-1, 0, 0], cache))
    return [*found, *(states[:, :, : cache.length].clone() for states in cache.layers)]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Equal to the last bit, tensor by tensor."""
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def wait_for(source: LayerStream) -> None:
    """Let what is being read come to its end."""
    for buffer in source._buffers:
        assert buffer.reading is not None
        buffer.reading.result()
