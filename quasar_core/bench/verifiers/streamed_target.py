"""What a target costs that memory does not hold, beside verifiers of any size, none of which has been made yet.

The larger a verifier, the fewer of the target's blocks stay beside it, and the more are read from the disk whenever the
target passes. So a target is loaded with all blocks streamed and its passes are timed once: what they compute, and how
fast blocks arrive meanwhile. A pass over which some blocks move takes as long as the longer of the two.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.decode.costs.cost_records import STREAMED_SIZES, pass_sampler
from quasar_core.decode.costs.pass_costs import CONTEXT, PassCost
from quasar_core.errors import UsageError
from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.memory.estimate import MemoryNeed, pair_need, workspace_bytes
from quasar_core.models.memory.offload import (
    PLANNED_CONTEXT,
    Budget,
    Movable,
    OffloadPlan,
    budget_here,
    movable_products,
    plan_within,
)
from quasar_core.models.pair import Pair
from quasar_core.models.weights.compressed_files import find_copy
from quasar_core.models.weights.lean_weights import tied_as_stored
from quasar_core.models.weights.streaming import BUFFERS, LayerStream
from quasar_core.store.model_config import read_text_config


@dataclass(frozen=True)
class ConfirmCost:
    """A target's pass beside a verifier: its cost, and the bytes that it reads from the disk."""

    cost: PassCost
    moved: int = 0


@dataclass(frozen=True)
class StreamedPasses:
    """Passes of a target all of whose blocks are streamed: computing alone, bytes of one, and bytes a second."""

    computing: PassCost
    pass_bytes: int
    bandwidth: float

    def confirm(self, share: float) -> ConfirmCost:
        """A pass of which this share of the blocks is read; computing and reading go on at the same time."""
        moved = int(share * self.pass_bytes)
        seconds = np.maximum(self.computing.seconds, moved / self.bandwidth)
        return ConfirmCost(PassCost(self.computing.sizes, tuple(seconds.tolist())), moved)


@dataclass(frozen=True)
class StreamedTarget:
    """Plans a target beside verifiers by the bytes of their codes, for so long a context and so much memory."""

    movable: Movable
    need: MemoryNeed
    tokens: int
    budget: Budget | None
    moves_all: bool
    allowed: int | None = None  # bytes that the process may take; None: what is free

    @classmethod
    def of(
        cls, folder: Path, dtype: torch.dtype, context: int, moves_all: bool, max_memory: int | None
    ) -> "StreamedTarget":
        """The target as decoding will plan it: with --offload target, or within the memory that is allowed or free."""
        config = tied_as_stored(DecoderConfig.parse(read_text_config(folder)), TensorFiles(folder))
        need = pair_need(folder, None, dtype)
        assert need is not None
        need = replace(need, workspace=workspace_bytes(config, dtype, models=2))
        copy, movable = find_copy(folder), Movable(*movable_products(folder, None), dtype)
        movable = movable.compressed(copy) if copy else movable
        return cls(movable, need, min(context, PLANNED_CONTEXT), budget_here(max_memory), moves_all, max_memory)

    def describe(self) -> str:
        """What is planned for."""
        moved = "all blocks of the target are" if self.moves_all else "what does not fit of the target is"
        room = f"the {self.allowed / 1e9:.3g} GB allowed" if self.allowed else "the memory that is free"
        return f"Chosen for decoding within {room}: {moved} read from the disk at each confirm."

    def plan(self, codes: int) -> OffloadPlan | None:
        """The plan beside a verifier of so many bytes; None where all stays. UsageError for too small an allowance."""
        return plan_within(self.movable, replace(self.need, verifier=codes), self.tokens, self.budget, self.moves_all)

    def share(self, codes: int) -> float | None:
        """The share of blocks that are streamed beside a verifier, as a stream counts; None where it does not fit."""
        try:
            plan = self.plan(codes)
        except UsageError:
            return None
        moved = 0 if plan is None else len(plan.streamed)
        return moved / len(self.movable.products) if moved > BUFFERS else 0.0


def measure_streamed(pair: Pair, now: Callable[[], float] = time.perf_counter) -> StreamedPasses:
    """Time a loaded target's passes of a few sizes, all of whose blocks are streamed."""
    target = pair.target
    assert isinstance(target, LeanDecoder)
    source = target.source
    assert isinstance(source, LayerStream)
    context = min(CONTEXT, pair.max_context // 2)
    sizes = sorted(size for size in STREAMED_SIZES if context + size <= pair.max_context)
    cache = target.new_cache(context + sizes[-1])
    target.forward([0] * context, cache, last_only=True)
    computing = []
    for size in sizes:
        waited, sample = source.seconds_waiting, pass_sampler(target, cache, size, now)
        seconds = sample()
        computing.append(max(seconds - (source.seconds_waiting - waited), 0.0))
    rising = np.maximum.accumulate(computing)
    return StreamedPasses(PassCost(tuple(sizes), tuple(rising.tolist())), source.pass_bytes, source.bandwidth)
