"""Plan which blocks of a target stay in a GPU's memory, which in main memory, and which on the disk.

The GPU holds the verifier, embedding, head, norms, cache and what passes need, two buffers for blocks that move, and as
many of the target's blocks as fit beside them. Main memory holds as many of those that move as it has room for; the
others are read from their files at each pass, through two rooms there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch

from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.config import LoadOptions
from quasar_core.errors import QuasarError, UsageError
from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.memory.estimate import (
    LEAST_SLACK,
    SLACK_SHARE,
    SMALLEST_CONTEXT,
    MemoryNeed,
    pair_need,
    sweep_bytes,
)
from quasar_core.models.memory.offload import (
    PLANNED_CONTEXT,
    Budget,
    Movable,
    OffloadPlan,
    budget_here,
    can_stream,
    describe_least,
    fewest_to_move,
    gigabytes,
    longest_context,
    movable_products,
)
from quasar_core.models.weights.device_queues import Link, open_link
from quasar_core.models.weights.device_stream import memory_bytes
from quasar_core.models.weights.lean_weights import tied_as_stored, why_folder_not_lean
from quasar_core.store.model_config import read_text_config


@dataclass(frozen=True)
class DeviceBudget(Budget):
    """The budget of a GPU's memory."""

    flag: ClassVar[str] = "--max-device-memory"

    @property
    def room(self) -> int:
        """What is left beside what no formula has: libraries' workspaces, compiled kernels, graphs."""
        return self.size - max(int(SLACK_SHARE * self.size), LEAST_SLACK)

    def to_ask(self, held: int) -> int:
        """See `Budget`; what is free is what others leave."""
        return max(held + LEAST_SLACK, int(held / (1 - SLACK_SHARE)) + 1)


@dataclass(frozen=True)
class DevicePlan(OffloadPlan):
    """What is streamed to a GPU; of that main memory holds the blocks `pinned`."""

    pinned: frozenset[int] = field(default_factory=frozenset)
    place: ClassVar[str] = "the GPU's memory"

    @property
    def moves(self) -> str:
        """See `OffloadPlan`."""
        read = len(self.streamed) - len(self.pinned)
        return f"copied there{f', {read} of them from the disk,' if read else ''}"

    def link(self, device: torch.device) -> Link:
        """See `OffloadPlan`."""
        return open_link(device, self.pinned)


def plan_on_device(
    folder: Path,
    checkpoint: VerifierCheckpoint | None,
    device: torch.device,
    dtype: torch.dtype,
    context: int,
    options: LoadOptions,
    beside: int = 0,
) -> DevicePlan | None:
    """Which of the target's blocks are streamed to a GPU; None where all stay. `beside` are bytes of further weights.

    UsageError for what was asked for and is not there, and where too little memory was allowed; QuasarError where too
    little is free.
    """
    if options.offload == "none" or not options.use_target:
        return None
    obstacle, moves_all = why_folder_not_lean(folder) or why_not_streamed(), options.offload == "target"
    if not can_stream(obstacle, moves_all, DeviceBudget.flag if options.max_device_memory else None):
        return None
    budget = device_budget(device, options.max_device_memory)
    rounds_head = options.kernel == "auto" and options.max_memory is None and options.max_device_memory is None
    whole = pair_need(folder, checkpoint, dtype, rounds_head=rounds_head)
    need = pair_need(folder, checkpoint, dtype)
    assert whole is not None
    assert need is not None
    tokens = min(context, options.max_context or PLANNED_CONTEXT)
    least = tokens if options.max_context else min(tokens, SMALLEST_CONTEXT)
    if not moves_all and whole.total(least) + whole.slack + beside <= budget.size:
        return None
    if options.compress:
        raise UsageError("--compress is for passes on the CPU: leave it out, or --offload none where the GPU has room.")
    config = tied_as_stored(DecoderConfig.parse(read_text_config(folder)), TensorFiles(folder))
    need = replace(need, target=need.target + beside, workspace=need.workspace + sweep_bytes(config, dtype))
    movable = Movable(*movable_products(folder, checkpoint), dtype)
    plan = plan_within_device(movable, need, tokens, budget, moves_all)
    pinned = held_blocks({block: movable.sizes[block] for block in plan.streamed}, budget_here(options.max_memory))
    return replace(plan, pinned=pinned, longest=None if (plan.longest or 0) >= context else plan.longest)


def why_not_streamed() -> str | None:
    """Why no weights are streamed to the GPUs that PyTorch was built for, or None where they are."""
    return None if torch.version.hip is None else "nobody has tried it on AMD's GPUs"


def device_budget(device: torch.device, max_device_memory: int | None) -> DeviceBudget:
    """What may be taken of a GPU's memory."""
    free, _ = torch.cuda.mem_get_info(device)
    if max_device_memory is None:
        return DeviceBudget(free, asked=False)
    return DeviceBudget(min(max_device_memory, free), asked=True)


def plan_within_device(
    movable: Movable, need: MemoryNeed, tokens: int, budget: DeviceBudget, moves_all: bool
) -> DevicePlan:
    """Stream as few blocks as let the pair fit with a cache of so many tokens; raises as `plan_on_device`."""
    whole, sizes = need.total(tokens), movable.sizes
    moved = sorted(sizes) if moves_all else fewest_to_move(sizes, whole - budget.room)
    found = movable.plan(moved, whole)
    if not found.streamed or found.held > budget.room:
        said = describe_least(movable, need, tokens, budget)
        if budget.asked:
            raise UsageError(said)
        raise QuasarError(f"The GPU has {gigabytes(budget.size)} GB free, too little for the pair: {said}")
    longest = longest_context(movable, need, budget)
    spare = max(budget.room - found.held, 0)
    return DevicePlan(found.streamed, found.count, found.held, spare=spare, tokens=tokens, longest=longest)


def held_blocks(sizes: Mapping[int, int], budget: Budget | None) -> frozenset[int]:
    """Blocks that main memory holds, of those that move; the others, spread evenly, are read at each pass.

    UsageError where too little was allowed even for these, QuasarError where too little is free.
    """
    if budget is None or memory_bytes(sizes, [*sizes]) <= budget.room:
        return frozenset(sizes)
    read = fewest_to_move(sizes, sum(sizes.values()) - budget.room)
    held = frozenset(sizes) - frozenset(read)
    needed = memory_bytes(sizes, [*held])
    if needed <= budget.room:
        return held
    said = (
        f"{budget.flag} must be at least {gigabytes(budget.to_ask(needed))} GB, for blocks of the target on their way "
        "from the disk to the GPU"
    )
    raise UsageError(f"{said}.") if budget.asked else QuasarError(f"Too little main memory is free: {said}.")
