"""Plan which blocks of a target stay in memory beside its verifier, and which are streamed past at each pass.

The verifier, embedding, head, norms and cache stay in any case, and what the verifier takes over from the target's
blocks. Every block that does not fit beside them is read from the files whenever the target passes: the fewest, spread
evenly, so that the reading never waits for long.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quasar_core.checkpoint.reader import TensorFiles, VerifierCheckpoint
from quasar_core.config import LoadOptions
from quasar_core.errors import UsageError
from quasar_core.models.decoder_config import DecoderConfig
from quasar_core.models.lean_weights import Streamed, tied_as_stored, why_folder_not_lean
from quasar_core.models.linear import Product, block_products
from quasar_core.models.memory import MemoryNeed, pair_need
from quasar_core.models.streaming import BUFFERS, LayerStream, buffer_bytes
from quasar_core.store.model_config import read_text_config
from quasar_core.system import free_memory, own_memory

PLANNED_CONTEXT = 4096  # tokens that a cache is planned for where --max-context does not say
RESERVE_SHARE, LEAST_RESERVE = 0.05, 64 << 20  # of what there is: for what loading and passes hold for a moment


@dataclass(frozen=True)
class Budget:
    """Bytes that a pair may take; `asked` by a user, or else estimated."""

    size: int
    asked: bool

    @property
    def room(self) -> int:
        """What is left of it beside the reserve."""
        return self.size - max(int(RESERVE_SHARE * self.size), LEAST_RESERVE)


@dataclass(frozen=True)
class OffloadPlan:
    """The products that are streamed, by their block; how many blocks there are; bytes that the pair then holds."""

    streamed: Streamed
    count: int
    held: int

    def describe(self, source: LayerStream) -> str:
        """What stays, what moves, and how long that takes at the speed that reading has shown."""
        seconds = source.pass_bytes / source.bandwidth if source.bandwidth else 0.0
        return (
            f"offload: {self.count - len(self.streamed)} of the target's {self.count} blocks stay in memory, with all "
            f"else {_gigabytes(self.held)} GB; {len(self.streamed)} are read whenever it passes, "
            f"{_gigabytes(source.pass_bytes)} GB in {seconds:.2g} s at {_gigabytes(source.bandwidth)} GB a second"
        )


def plan_offload(
    folder: Path,
    checkpoint: VerifierCheckpoint | None,
    device: torch.device,
    dtype: torch.dtype,
    context: int,
    options: LoadOptions,
) -> OffloadPlan | None:
    """Which of the target's blocks are streamed; None where all stay.

    UsageError for what was asked for and is not there, and where too little memory was allowed.
    """
    if options.offload == "none" or not options.use_target:
        return None
    obstacle = why_folder_not_lean(folder) or (None if device.type == "cpu" else f"the device is {device}")
    if obstacle:
        flag = "--offload target" if options.offload == "target" else "--max-memory"
        if options.offload == "target" or options.max_memory is not None:
            raise UsageError(f"{flag} streams blocks of our own decoder on the CPU: {obstacle}.")
        return None
    need = pair_need(folder, checkpoint, dtype)
    assert need is not None
    movable, count = movable_products(folder, checkpoint)
    tokens = min(context, options.max_context or PLANNED_CONTEXT)
    budget = budget_here(options.max_memory)
    fits = plan_to_fit(movable, dtype, need, tokens, count, budget) if budget else None
    return plan_all(movable, dtype, need, tokens, count) if options.offload == "target" else fits


def budget_here(max_memory: int | None) -> Budget | None:
    """What may be taken here, beside what the process holds already; None where the system does not tell."""
    free = free_memory()
    if max_memory is None:
        return None if free is None else Budget(free, asked=False)
    left = max_memory - own_memory()
    return Budget(left if free is None else min(left, free), asked=True)


def plan_all(movable: Streamed, dtype: torch.dtype, need: MemoryNeed, tokens: int, count: int) -> OffloadPlan:
    """Every block that can be is streamed."""
    sizes = {block: buffer_bytes(products, dtype) for block, products in movable.items()}
    return OffloadPlan(movable, count, need.total(tokens) - saved_bytes(sizes, sorted(sizes)))


def plan_to_fit(
    movable: Streamed, dtype: torch.dtype, need: MemoryNeed, tokens: int, count: int, budget: Budget
) -> OffloadPlan | None:
    """As few blocks are streamed as lets the pair fit; None where all may stay.

    Where all that can be is streamed and that is not enough, a budget that was asked for is a UsageError; one that was
    estimated is tried.
    """
    whole = need.total(tokens)
    if whole <= budget.room:
        return None
    sizes = {block: buffer_bytes(products, dtype) for block, products in movable.items()}
    moved = fewest_to_move(sizes, whole - budget.room)
    held = whole - saved_bytes(sizes, moved)
    if budget.asked and held > budget.room:
        least = held + own_memory() + budget.size - budget.room
        raise UsageError(
            f"--max-memory must be at least {_gigabytes(least)} GB with a context of {tokens} tokens, even with the "
            "target's blocks streamed: a smaller --max-context, or --verify quantized --no-target, takes less."
        )
    return OffloadPlan({block: movable[block] for block in moved}, count, held)


def movable_products(folder: Path, checkpoint: VerifierCheckpoint | None) -> tuple[dict[int, list[Product]], int]:
    """The products of each block whose weights nobody but the target needs, and the number of blocks.

    They are those that the verifier has in codes; all where there is no verifier.
    """
    config = tied_as_stored(DecoderConfig.parse(read_text_config(folder)), TensorFiles(folder))
    packed = None if checkpoint is None else set(checkpoint.layer_names)
    found: dict[int, list[Product]] = {}
    for block in range(config.num_layers):
        products = block_products(config, block).values()
        own = [product for product in products if packed is None or packed.issuperset(product.names)]
        if own:
            found[block] = own
    return found, config.num_layers


def fewest_to_move(sizes: Mapping[int, int], excess: int) -> list[int]:
    """Blocks, spread evenly over the model, without which so many bytes less are held; all where that is too few."""
    blocks = sorted(sizes)
    for count in range(1, len(blocks)):
        some = [blocks[place * len(blocks) // count] for place in range(count)]
        if saved_bytes(sizes, some) >= excess:
            return some
    return blocks


def saved_bytes(sizes: Mapping[int, int], moved: Sequence[int]) -> int:
    """What is not held when these blocks are streamed: their bytes, less the buffers that they pass through."""
    return sum(sizes[block] for block in moved) - BUFFERS * max((sizes[block] for block in moved), default=0)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g}"
