"""A verifier that attends to the first few and the last positions of a text only, over the same weights and cache.

At a long context a verify pass spends its time on keys and values. What a verifier does not see costs agreement, and
nothing else in `exact`: the target, which confirms, sees everything. The first positions stay, since attention to them
takes up what no other position asks for (attention sinks: Xiao et al., 2024; as drafts: TriForce, Sun et al., 2024).
"""

from dataclasses import replace

from quasar_core.models import loading
from quasar_core.models.base import CausalLM
from quasar_core.models.config.block import BlockConfig
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.verifier.variants import with_layers

SINKS, SEEN = 4, 512  # positions at the text's beginning, and up to the token's own


def why_not_narrow(verifier: CausalLM) -> str | None:
    """Why a verifier cannot be had so, or None where it can."""
    if not isinstance(verifier, LeanDecoder):
        return "its verifier runs on transformers"
    if verifier.config.is_recurrent:
        return "recurrent layers read a text from its beginning"
    if verifier.device.type != "cpu":
        return f"there is no such attention on {verifier.device.type}"
    if all(block == _narrow(block, SINKS, SEEN) for block in verifier.config.blocks):
        return f"no layer of it sees more than {SEEN} positions"
    return None


def narrowed(verifier: LeanDecoder, sinks: int = SINKS, seen: int = SEEN) -> LeanDecoder:
    """The verifier with layers that attend to `sinks` positions at the text's beginning and `seen` at its end."""
    blocks = tuple(_narrow(block, sinks, seen) for block in verifier.config.blocks)
    layers = [replace(layer, shape=block) for layer, block in zip(verifier.layers, blocks, strict=True)]
    narrow = with_layers(verifier, replace(verifier.config, blocks=blocks), layers)
    if verifier.fast is not None:
        loading.attach(narrow)
    return narrow


def _narrow(block: BlockConfig, sinks: int, seen: int) -> BlockConfig:
    """A block that sees less; one with a window as small stays."""
    if block.window is not None and block.window <= seen:
        return block
    return replace(block, window=seen, sinks=sinks)
