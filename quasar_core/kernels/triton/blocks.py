"""Choose the block shapes of a product: those that were tuned on this device, else a rule of thumb.

Tuned shapes are kept in quasar's own folder, one file per device, Triton and PyTorch version.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton

from quasar_core.kernels.times import sources_hash
from quasar_core.kernels.triton.language import PARTIAL_FLOATS
from quasar_core.kernels.triton.weights import BLOCK, TritonWeight
from quasar_core.store.measured import Measured, measured_file
from quasar_core.typed import build

TILE_ROWS = 8  # of a pass, in one product of the tensor cores with packed codes
_RESERVED = 1024  # bytes of shared memory that CUDA takes of each program
_PROGRAMS = 4  # for each multiprocessor: so many fit, and enough bytes are under way


@dataclass(frozen=True)
class Blocks:
    """Block shapes: outputs and inputs of a program's step, programs that share the inputs, buffered steps."""

    outputs: int
    inputs: int
    splits: int
    stages: int


def packed_key(weight: TritonWeight, gated: bool = False) -> str:
    """What the best shapes of a packed product depend on."""
    zeros = "asymmetric" if weight.has_zeros else "symmetric"
    key = f"packed {weight.in_features} {weight.out_features} {weight.bits} bits {weight.chunk} {zeros}"
    return f"{key} gated" if gated else key


def dense_key(weight: torch.Tensor, gated: bool = False) -> str:
    """What the best shapes of a product with plain weights depend on."""
    key = f"dense {weight.shape[1]} {weight.shape[0]} {str(weight.dtype).removeprefix('torch.')}"
    return f"{key} gated" if gated else key


def packed_blocks(weight: TritonWeight, device: torch.device, gated: bool = False) -> Blocks:
    """For packed codes; a step is as many inputs as the layout says."""
    tuned = tuned_blocks(device, packed_key(weight, gated))
    if tuned:
        return Blocks(**tuned)
    if gated:
        return gated_blocks(packed_blocks(weight, device), weight.in_features, weight.out_features, packed=True)
    return packed_rule(weight, device)


def packed_rule(weight: TritonWeight, device: torch.device) -> Blocks:
    """The rule of thumb's for packed codes, whatever has been tuned."""
    inputs = weight.chunk * weight.chunks_per_step
    step_bytes = weight.words.element_size() * weight.words.shape[2] + 2 * TILE_ROWS * inputs
    return Blocks(BLOCK, inputs, splits_for(weight.words.shape[0], weight.steps, device), _stages(step_bytes, device))


def dense_blocks(weight: torch.Tensor, device: torch.device, gated: bool = False) -> Blocks:
    """For weights [out, in] of 16 or 8 bits: steps of 256 bytes of each output."""
    tuned = tuned_blocks(device, dense_key(weight, gated))
    if tuned:
        return Blocks(**tuned)
    if gated:
        return gated_blocks(dense_blocks(weight, device), weight.shape[1], weight.shape[0], packed=False)
    return dense_rule(weight, device)


def dense_rule(weight: torch.Tensor, device: torch.device) -> Blocks:
    """The rule of thumb's for weights [out, in], whatever has been tuned."""
    inputs = 256 // weight.element_size()
    steps = -(-weight.shape[1] // inputs)
    return Blocks(BLOCK, inputs, splits_for(-(-weight.shape[0] // BLOCK), steps, device), stages=4)


def gated_blocks(plain: Blocks, in_features: int, out_features: int, *, packed: bool) -> Blocks:
    """For a gated product, from what is best without the gate: two blocks a program, and as many programs.

    They take no more shared memory: half the inputs in a step, or of codes, whose steps are stored, a stage less.
    """
    if plain.outputs > BLOCK:
        return plain
    inputs = plain.inputs if packed else plain.inputs // 2
    room = max(1, PARTIAL_FLOATS // (64 * out_features))
    splits = even_splits(-(-in_features // inputs), min(2 * plain.splits, room))
    return Blocks(2 * BLOCK, inputs, splits, max(plain.stages - packed, 2))


def why_not_gated(out_features: int) -> str | None:
    """Why a product of gates and what they gate cannot end with the gate, or None where it can."""
    return f"{out_features // 2} gates are not a multiple of {BLOCK}" if out_features % (2 * BLOCK) else None


def splits_for(blocks: int, steps: int, device: torch.device) -> int:
    """How many programs share the inputs: all run at once and fill the device, with as many steps each."""
    return even_splits(steps, max(1, min(_PROGRAMS * multiprocessors(device) // blocks, 16)))


def _stages(step_bytes: int, device: torch.device) -> int:
    """See `stages_for`; interpreted kernels have three."""
    if device.type != "cuda":
        return 3
    return stages_for(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor, step_bytes)


def stages_for(shared_memory: int, step_bytes: int) -> int:
    """Three, so that two steps are under way, where four programs with them fit a multiprocessor; else two."""
    return 3 if _PROGRAMS * (2 * step_bytes + _RESERVED) <= shared_memory else 2


def even_splits(steps: int, wanted: int) -> int:
    """At most so many, none of them without a step."""
    return -(-steps // -(-steps // min(wanted, steps)))


def multiprocessors(device: torch.device) -> int:
    """The GPU's multiprocessors; interpreted kernels are given four, so that splitting is tested."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


KIND, FIELDS = "blocks", ("outputs", "inputs", "splits", "stages")


def tuned_blocks(device: torch.device, key: str) -> dict[str, int] | None:
    """The measured shape of a product, or None where it has not been tuned on this device."""
    known = _kept(device).get(key) if _is_tunable(device) else None
    return known.value if known else None


def keep_tuned(device: torch.device, found: dict[str, dict[str, int]]) -> None:
    """Add measured shapes to those in use, and to the device's file."""
    _kept(device).keep(found)


def trouble_with_file(device: torch.device) -> str | None:
    """Why the device's file could not be read or written; None where nothing was wrong."""
    return _kept(device).trouble if _is_tunable(device) else None


def _is_tunable(device: torch.device) -> bool:
    return device.type == "cuda"


@cache
def _kept(device: torch.device) -> Measured[dict[str, int]]:
    versions = {"triton": triton.__version__, "torch": torch.__version__, "kernels": sources_hash()}
    conditions = {"device": _device_name(device), **versions}
    return Measured(measured_file(KIND, conditions), conditions, _parse)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _parse(content: Any) -> dict[str, int]:
    blocks = build(dict[str, int], content)
    if blocks.keys() != set(FIELDS) or min(blocks.values()) < 1:
        raise ValueError("no blocks")
    return blocks
