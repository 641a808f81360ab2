"""The calibration text on its way through the blocks: hidden states held once, read and written batch by batch.

Letters: N rows of L tokens, B rows of a batch, H hidden.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from quasar_core.errors import QuasarError
from quasar_core.quantize.blocks import find_blocks
from quasar_core.quantize.kept import KeptOutputs, allocate, first_output, standing_in
from quasar_core.quantize.products import FastPasses

# As many tokens as a processor's caches, and a little memory, hold between two operations; at most so many.
BATCH_TOKENS, BATCH_VALUES = 2048, 2**21


class Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


@dataclass(frozen=True)
class Batch:
    """Rows of the text: the hidden states [B, L, H] that enter the next block, and what it takes beside them.

    `outputs` are what modules of the block give that need not run again, by name.
    """

    rows: slice
    hidden: torch.Tensor
    kwargs: dict[str, Any]
    outputs: Mapping[str, Any] = field(default_factory=dict)


class Activations:
    """Hidden states [N, L, H] in front of the next block; `spill` names the file that holds them instead of memory."""

    def __init__(
        self,
        hidden: torch.Tensor,
        kwargs: dict[int, list[dict[str, Any]]],
        device: torch.device,
        spill: Path | None = None,
    ) -> None:
        self.hidden, self.device = hidden, device
        self.block = 0  # the one that comes next
        self.reference: Activations | None = None  # the same text in the full-precision model, where it is kept
        self._kwargs = kwargs  # of each block, by the rows of a batch
        self._rows = max(kwargs)
        self.kept = KeptOutputs(len(hidden), self._rows, spill)

    def keep_reference(self, spill: Path | None = None) -> None:
        """Hold what enters the first block a second time, to go through the full-precision blocks."""
        hidden = allocate(tuple(self.hidden.shape), self.hidden.dtype, spill)
        self.reference = Activations(hidden.copy_(self.hidden), self._kwargs, self.device, spill)

    def batches(self) -> Iterator[Batch]:
        """All rows, on the device, a few at a time."""
        for begin in range(0, len(self.hidden), self._rows):
            yield self._batch(slice(begin, min(begin + self._rows, len(self.hidden))))

    def fork(self) -> "Activations":
        """A copy in memory, to go another way through the blocks that are left."""
        copied = Activations(self.hidden.clone(), self._kwargs, self.device)
        copied.block = self.block
        return copied

    def pairs(self) -> Iterator[tuple[Batch, Batch]]:
        """The batches, each with the reference's batch of the same rows."""
        assert self.reference is not None
        return zip(self.batches(), self.reference.batches(), strict=True)

    def first_row(self) -> Batch:
        """A batch of one row."""
        whole = self._batch(slice(0, min(self._rows, len(self.hidden))))
        return Batch(slice(0, 1), whole.hidden[:1], _first_row(whole.kwargs))

    def advance(self, block: torch.nn.Module) -> None:
        """Replace what enters a block by what leaves it; the block after it comes next."""
        for batch in self.batches():
            self.hidden[batch.rows] = run_block(block, batch).to(self.hidden)
        self.kept.forget()
        self.block += 1
        if self.block == len(self._kwargs[self._rows]):
            self.kept.clear()

    def _batch(self, rows: slice) -> Batch:
        kwargs = self._kwargs[rows.stop - rows.start][self.block]
        return Batch(rows, self.hidden[rows].to(self.device), kwargs, self.kept.of(rows, self.device))


def run_block(block: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """What leaves the block, [B, L, H]."""
    with FastPasses(), standing_in(block, batch.outputs):
        return first_output(block(batch.hidden, **batch.kwargs))


def batch_tokens(hidden: int, on_device: bool) -> int:
    """Tokens that pass through a block at once, if rows are shorter; a GPU has room for the most."""
    return BATCH_TOKENS if on_device else max(1, min(BATCH_TOKENS, BATCH_VALUES // hidden))


@torch.inference_mode()
def capture_first_inputs(
    model: PreTrainedModel, samples: torch.Tensor, device: torch.device | None = None, spill: Path | None = None
) -> Activations:
    """What enters the first block when the model reads samples [N, L]; of the model, the embedding is enough.

    Blocks run on `device`. QuasarError where blocks take something that depends on the text, which is not kept.
    """
    home = embedding_device(model)
    place = device or home
    width = int(model.config.get_text_config().hidden_size)
    rows = max(1, batch_tokens(width, place.type != "cpu") // samples.shape[1])
    hidden: torch.Tensor | None = None
    kwargs: dict[int, list[dict[str, Any]]] = {}
    for begin in range(0, len(samples), rows):
        ids = samples[begin : begin + rows].to(home)
        entered, taken = _enter(model, ids)
        if hidden is None:
            hidden = allocate((len(samples), *entered.shape[1:]), entered.dtype, spill)
        hidden[begin : begin + rows] = entered
        known = kwargs.setdefault(len(ids), [_moved(block, place) for block in taken])
        if begin and not all(map(_same, known, (_moved(block, place) for block in taken))):
            raise QuasarError(
                f"{type(model).__name__} gives its blocks inputs that depend on the text: it cannot be quantized "
                "block by block."
            )
    if hidden is None:
        raise QuasarError("The calibration text has no rows.")
    return Activations(hidden, kwargs, place, spill)


def embedding_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go."""
    return cast(torch.Tensor, model.get_input_embeddings().weight).device


def _enter(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """What enters the first block, and what each block takes."""
    blocks = find_blocks(model)[1]
    entered: list[torch.Tensor] = []
    taken: list[dict[str, Any]] = []

    def pass_through(
        hidden_states: torch.Tensor, *others: Any, past_key_values: Any = None, use_cache: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        if others:
            raise QuasarError(f"{type(model).__name__} gives its blocks inputs by position: it cannot be quantized.")
        entered.append(hidden_states)
        taken.append(kwargs)
        if len(entered) == len(blocks):
            raise Stop
        return hidden_states

    with blocks_replaced_by(blocks, pass_through), contextlib.suppress(Stop):
        model(input_ids=ids, use_cache=False)
    return entered[0], taken


@contextlib.contextmanager
def blocks_replaced_by(blocks: torch.nn.ModuleList, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Let all blocks run another function."""
    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own again


def _first_row(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Block arguments for one row: a mask has the batch's rows, rotary tables may have one for all."""
    mask = kwargs.get("attention_mask")
    return {**kwargs, "attention_mask": mask[:1]} if isinstance(mask, torch.Tensor) else kwargs


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    return value


def _same(one: Any, other: Any) -> bool:
    """Equal, or alike in what a batch of fewer rows may differ in."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return True
