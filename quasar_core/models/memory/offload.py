"""Plan which blocks of a target stay in memory beside its verifier, and which are streamed past at each pass.

The verifier, embedding, head, norms and cache stay in any case, and what the verifier takes over from the target's
blocks. Every block that does not fit beside them is read from the files whenever the target passes: the fewest, spread
evenly, so that the reading never waits for long. Where there is a copy of the blocks in 12 bits (`compressed_files.py`)
all of them come from there, those that stay too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.config import LoadOptions
from quasar_core.errors import UsageError
from quasar_core.kernels.cpu.compressed import BITS
from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.decoder.linear import Product, block_products
from quasar_core.models.memory.estimate import MemoryNeed, pair_need
from quasar_core.models.weights.compressed_files import CompressedCopy, find_copy, make_copy, why_not_copied
from quasar_core.models.weights.device_queues import Link
from quasar_core.models.weights.lean_weights import tied_as_stored, why_folder_not_lean
from quasar_core.models.weights.streaming import BUFFERS, LayerStream, Products, buffer_bytes
from quasar_core.records import Progress, no_progress
from quasar_core.store.model_config import read_text_config
from quasar_core.system import free_memory, own_memory

PLANNED_CONTEXT = 4096  # tokens that a cache is planned for where --max-context does not say
LEAST_CONTEXT = 16  # tokens; a text that is shorter is none
RESERVE_SHARE, LEAST_RESERVE = 0.05, 64 << 20  # of what there is: for what loading and passes hold for a moment


@dataclass(frozen=True)
class Budget:
    """Bytes that a pair may take of some memory; `asked` by a user, or else estimated."""

    size: int
    asked: bool
    flag: ClassVar[str] = "--max-memory"

    @property
    def room(self) -> int:
        """What is left of it beside the reserve."""
        return self.size - max(int(RESERVE_SHARE * self.size), LEAST_RESERVE)

    def to_ask(self, held: int) -> int:
        """What would have to be asked for, so that there is room for so many bytes."""
        return held + own_memory() + self.size - self.room


@dataclass(frozen=True)
class OffloadPlan:
    """The products that are streamed, by their block; how many blocks there are; bytes that the pair then holds.

    Where there is a copy in 12 bits: it, and the products that stay and come from it. `spare` bytes of memory are left,
    as far as that is known. A cache of `tokens` is counted, and the longest one fits with every block streamed.
    """

    streamed: Products
    count: int
    held: int
    copy: CompressedCopy | None = None
    kept: Products = field(default_factory=dict)
    spare: int = 0
    tokens: int = 0
    longest: int | None = None
    place: ClassVar[str] = "memory"

    def describe(self, source: LayerStream) -> str:
        """What stays, what moves, and how long that takes at the speed that reading has shown."""
        form = f", in {BITS} bits" if self.copy else ""
        cache = f" and a cache of {self.tokens:,} tokens" if self.tokens else ""
        held = f"stay in {self.place}{form}, with all else{cache} {gigabytes(self.held)} GB"
        if not source.pass_bytes:
            return f"offload: all of the target's {self.count} blocks {held}"
        seconds = source.pass_bytes / source.bandwidth if source.bandwidth else 0.0
        cached = "" if source.direct else " through the page cache (no direct reads of these files here)"
        return (
            f"offload: {self.count - len(self.streamed)} of the target's {self.count} blocks {held}; "
            f"{len(self.streamed)} are {self.moves} whenever it passes, {gigabytes(source.pass_bytes)} GB in "
            f"{seconds:.2g} s at {gigabytes(source.bandwidth)} GB a second{cached}{self._describe_longest()}"
        )

    @property
    def moves(self) -> str:
        """What is done to the blocks that are streamed."""
        return "read"

    def of_target(self, device: torch.device) -> dict[str, Any]:
        """What loading the target is to know, by the arguments of `load_target`."""
        return {"streamed": self.streamed, "kept": self.kept, "copy": self.copy, "link": self.link(device)}

    def link(self, device: torch.device) -> Link | None:
        """How the streamed blocks come to the device; None where it reads the files itself."""
        return None

    def within(self, context: int) -> "OffloadPlan":
        """The plan for texts of at most so many tokens; where memory holds them it bounds no text."""
        return replace(self, longest=None) if self.longest is not None and self.longest >= context else self

    def _describe_longest(self) -> str:
        """How long a text may be, where memory bounds it."""
        if self.longest is None:
            return ""
        return f"; memory holds texts of up to {max(self.longest, self.tokens):,} tokens (--max-context)"


@dataclass(frozen=True)
class Movable:
    """The products of each block that may be streamed, how many blocks there are, and what each of them takes."""

    products: Products
    count: int
    dtype: torch.dtype
    copy: CompressedCopy | None = None

    @property
    def sizes(self) -> dict[int, int]:
        """Bytes in a buffer, by block."""
        return {block: buffer_bytes(products, self.dtype, self.copy) for block, products in self.products.items()}

    def plan(self, moved: Sequence[int], whole: int) -> OffloadPlan:
        """The plan in which these blocks are streamed, of a pair that takes so many bytes with all in memory."""
        streamed = {block: self.products[block] for block in moved}
        kept = {block: some for block, some in self.products.items() if self.copy and block not in streamed}
        return OffloadPlan(streamed, self.count, whole - saved_bytes(self.sizes, moved), self.copy, kept)

    def compressed(self, copy: CompressedCopy) -> "Movable":
        """The products as a copy in 12 bits has them."""
        return replace(self, copy=copy)


def plan_offload(
    folder: Path,
    checkpoint: VerifierCheckpoint | None,
    dtype: torch.dtype,
    context: int,
    options: LoadOptions,
    progress: Progress = no_progress,
    beside: int = 0,
) -> OffloadPlan | None:
    """Which of the target's blocks are streamed; None where all stay. `beside` are bytes of further weights.

    UsageError for what was asked for and is not there, and where too little memory was allowed.
    """
    if options.offload == "none" or not options.use_target:
        return None
    obstacle = why_folder_not_lean(folder)
    if not can_stream(obstacle, options.offload == "target", "--max-memory" if options.max_memory else None):
        return None
    need = pair_need(folder, checkpoint, dtype)
    assert need is not None
    need = replace(need, target=need.target + beside)
    movable = Movable(*movable_products(folder, checkpoint), dtype)
    tokens = min(context, options.max_context or PLANNED_CONTEXT)
    budget = budget_here(options.max_memory)
    plan = plan_within(movable, need, tokens, budget, options.offload == "target")
    if plan is None:
        return None
    copy = choose_copy(folder, dtype, options.compress, progress)
    if copy:
        plan = plan_within(movable.compressed(copy), need, tokens, budget, options.offload == "target")
    return plan and plan.within(context)


def can_stream(obstacle: str | None, moves_all: bool, memory_flag: str | None) -> bool:
    """Whether blocks can be streamed; UsageError where they cannot, and it was asked for, by all or by a size."""
    flag = "--offload target" if moves_all else memory_flag
    if obstacle and flag:
        raise UsageError(f"{flag} streams blocks of our own decoder: {obstacle}.")
    return obstacle is None


def plan_within(
    movable: Movable, need: MemoryNeed, tokens: int, budget: Budget | None, moves_all: bool
) -> OffloadPlan | None:
    """What is streamed with a cache of so many tokens; None where all stays. Raises as `plan_to_fit` does."""
    fits = plan_to_fit(movable, need, tokens, budget) if budget else None
    plan = plan_all(movable, need, tokens) if moves_all else fits
    if plan is None or budget is None:
        return plan and replace(plan, tokens=tokens)
    spare = max(budget.room - plan.held, 0)
    return replace(plan, spare=spare, tokens=tokens, longest=longest_context(movable, need, budget))


def longest_context(movable: Movable, need: MemoryNeed, budget: Budget) -> int:
    """Tokens of the longest cache that fits, with every block streamed; 0 where none does."""
    return max(budget.room - plan_all(movable, need, 0).held, 0) // max(need.per_token, 1)


def choose_copy(folder: Path, dtype: torch.dtype, wanted: bool | None, progress: Progress) -> CompressedCopy | None:
    """The blocks in 12 bits: written where that is `wanted`, used where they are there, with False never.

    UsageError where what is wanted cannot be.
    """
    if wanted is False:
        return None
    obstacle = why_not_copied(folder, dtype)
    if wanted and obstacle:
        raise UsageError(f"--compress keeps a streamed model's blocks in {BITS} bits: {obstacle}.")
    if obstacle:
        return None
    return make_copy(folder, progress) if wanted else find_copy(folder)


def budget_here(max_memory: int | None) -> Budget | None:
    """What may be taken here, beside what the process holds already; None where the system does not tell."""
    free = free_memory()
    if max_memory is None:
        return None if free is None else Budget(free, asked=False)
    left = max_memory - own_memory()
    return Budget(left if free is None else min(left, free), asked=True)


def plan_all(movable: Movable, need: MemoryNeed, tokens: int) -> OffloadPlan:
    """Every block that can be is streamed."""
    return movable.plan(sorted(movable.products), all_in_memory(movable, need, tokens))


def all_in_memory(movable: Movable, need: MemoryNeed, tokens: int) -> int:
    """Bytes of the pair with every block in memory, in 12 bits where they come from a copy."""
    if movable.copy is None:
        return need.total(tokens)
    plain = sum(buffer_bytes(products, movable.dtype) for products in movable.products.values())
    return need.total(tokens) - plain + sum(movable.sizes.values())


def plan_to_fit(movable: Movable, need: MemoryNeed, tokens: int, budget: Budget) -> OffloadPlan | None:
    """Stream as few blocks as let the pair fit; None where all may stay as they are stored.

    Where all that can be is streamed and that is not enough, a budget that was asked for is a UsageError; one that was
    estimated is tried.
    """
    whole = all_in_memory(movable, need, tokens)
    if whole <= budget.room and movable.copy is None:
        return None
    plan = movable.plan(fewest_to_move(movable.sizes, whole - budget.room), whole)
    if budget.asked and plan.held > budget.room:
        raise UsageError(describe_least(movable, need, tokens, budget))
    return plan


def describe_least(movable: Movable, need: MemoryNeed, tokens: int, budget: Budget) -> str:
    """What would have to be allowed of a memory, where it is too little even with every block streamed."""
    least = budget.to_ask(plan_all(movable, need, tokens).held)
    longest = longest_context(movable, need, budget)
    shorter = f"--max-context {longest} would fit, and" if longest >= LEAST_CONTEXT else "no text would fit;"
    return (
        f"{budget.flag} must be at least {gigabytes(least)} GB with a context of {tokens} tokens, even with the "
        f"target's blocks streamed: {shorter} --verify quantized --no-target takes less."
    )


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


def gigabytes(size: float) -> str:
    """Three digits of it."""
    return f"{size / 1e9:.3g}"
