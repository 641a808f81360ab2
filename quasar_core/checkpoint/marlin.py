"""Whether a GPTQ checkpoint runs on the Marlin kernel, which serves it fastest on NVIDIA GPUs. Pure.

The rules of its two users, as of late 2026. vLLM (`layers/quantization/utils/marlin_utils.py`): symmetric codes
of 4 or 8 bits; groups of 32, 64, 128 or one per output; outputs a multiple of 64 and inputs of 128, its smallest tiles
(so of every group too). GPTQModel (`nn_modules/qlinear/marlin.py`): the same bits, groups and symmetry, sizes of
any kind. What satisfies vLLM satisfies both.
"""

from collections.abc import Iterable
from typing import Protocol

from quasar_core.checkpoint.stored_layers import StoredLayer

BITS = (4, 8)
GROUP_SIZES = (-1, 32, 64, 128)
TILE_INPUTS, TILE_OUTPUTS = 128, 64


class Codes(Protocol):
    """What the rules ask of a layer's codes; a group size of −1 is one scale per output."""

    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def bits(self) -> int: ...
    @property
    def group_size(self) -> int: ...


def why_not_marlin(layer: Codes, sym: bool) -> str | None:
    """Why vLLM runs a layer of these codes on another kernel, or None where it takes Marlin."""
    if not sym:
        return "its codes are asymmetric"
    if layer.bits not in BITS:
        return f"it takes 4 and 8 bits, not {layer.bits}"
    if layer.group_size not in GROUP_SIZES:
        return f"it takes groups of 32, 64, 128 or a whole row, not {layer.group_size}"
    if layer.in_features % TILE_INPUTS:
        return f"{layer.in_features} inputs are not a multiple of {TILE_INPUTS}"
    if layer.out_features % TILE_OUTPUTS:
        return f"{layer.out_features} outputs are not a multiple of {TILE_OUTPUTS}"
    return None


def describe_marlin(layers: Iterable[StoredLayer], sym: bool) -> str:
    """One phrase for a checkpoint."""
    reasons = [(layer.name, reason) for layer in layers if (reason := why_not_marlin(layer, sym)) is not None]
    if not reasons:
        return "yes"
    (name, reason), more = reasons[0], len(reasons) - 1
    return f"no: {reason} ({name}" + (f" and {more} more)" if more else ")")
