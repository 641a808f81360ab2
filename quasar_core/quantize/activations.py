"""The calibration text on its way through the blocks: hidden states held once, read and written batch by batch.

Letters: N rows of L tokens, B rows of a batch, H hidden.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from quasar_core.errors import QuasarError
from quasar_core.quantize.blocks import find_blocks

BATCH_TOKENS = 4096


class Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


@dataclass(frozen=True)
class Batch:
    """Rows of the text: the hidden states [B, L, H] that enter the next block, and what it takes beside them."""

    rows: slice
    hidden: torch.Tensor
    kwargs: dict[str, Any]


class Activations:
    """Hidden states [N, L, H] in front of the next block; `spill` names the file that holds them instead of memory."""

    def __init__(self, hidden: torch.Tensor, kwargs: dict[int, list[dict[str, Any]]], device: torch.device) -> None:
        self.hidden, self.device = hidden, device
        self.block = 0  # the one that comes next
        self.reference: Activations | None = None  # the same text in the full-precision model, where it is kept
        self._kwargs = kwargs  # of each block, by the rows of a batch
        self._rows = max(kwargs)

    def keep_reference(self, spill: Path | None = None) -> None:
        """Hold what enters the first block a second time, to go through the full-precision blocks."""
        hidden = allocate(tuple(self.hidden.shape), self.hidden.dtype, spill)
        self.reference = Activations(hidden.copy_(self.hidden), self._kwargs, self.device)

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
        self.block += 1

    def _batch(self, rows: slice) -> Batch:
        kwargs = self._kwargs[rows.stop - rows.start][self.block]
        return Batch(rows, self.hidden[rows].to(self.device), kwargs)


def run_block(block: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """What leaves the block, [B, L, H]."""
    output = block(batch.hidden, **batch.kwargs)
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@torch.inference_mode()
def capture_first_inputs(
    model: PreTrainedModel, samples: torch.Tensor, device: torch.device | None = None, spill: Path | None = None
) -> Activations:
    """What enters the first block when the model reads samples [N, L]; of the model, the embedding is enough.

    Blocks run on `device`. QuasarError where blocks take something that depends on the text, which is not kept.
    """
    home = embedding_device(model)
    place = device or home
    rows = max(1, BATCH_TOKENS // samples.shape[1])
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
    return Activations(hidden, kwargs, place)


def embedding_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go."""
    return cast(torch.Tensor, model.get_input_embeddings().weight).device


def allocate(shape: tuple[int, ...], dtype: torch.dtype, spill: Path | None) -> torch.Tensor:
    """An empty tensor in memory, or in a file of that name, whose pages the system may write out."""
    if spill is None:
        return torch.empty(shape, dtype=dtype)
    size = torch.Size(shape).numel()
    with spill.open("wb") as file:
        # Room that turns out to be missing later would end the process, so it is taken now where the system can.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
        else:
            file.truncate(size * dtype.itemsize)
    return torch.from_file(str(spill), shared=True, size=size, dtype=dtype).view(shape)


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
