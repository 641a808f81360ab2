"""Make a decoder from the parts of another; both take the same caches."""

from collections.abc import Sequence

import torch

from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.decoder.layer import DecoderLayer, Linear
from quasar_core.models.decoder.lean_decoder import LeanDecoder


def with_layers(decoder: LeanDecoder, config: DecoderConfig, layers: Sequence[DecoderLayer]) -> LeanDecoder:
    """The decoder with other switches in its layers; no fast pass yet."""
    return _of_parts(decoder, config, layers, decoder.head, decoder.head_tokens)


def with_head(decoder: LeanDecoder, head: Linear, tokens: torch.Tensor) -> LeanDecoder:
    """The decoder with a head [R, in] of some tokens [R] int32; no fast pass yet."""
    return _of_parts(decoder, decoder.config, decoder.layers, head, tokens)


def _of_parts(
    decoder: LeanDecoder,
    config: DecoderConfig,
    layers: Sequence[DecoderLayer],
    head: Linear,
    head_tokens: torch.Tensor | None,
) -> LeanDecoder:
    own = LeanDecoder(config, decoder.embedding, layers, decoder.norm, head, decoder.ropes, decoder.inputs)
    own.head_tokens, own.source = head_tokens, decoder.source
    return own
