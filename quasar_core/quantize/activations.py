"""The calibration text on its way through the blocks: hidden states held once, read and written batch by batch.

Letters: N rows of L tokens, B rows of a batch, H hidden.
"""

import contextlib
import functools
import inspect
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


# How a block gives its hidden states [B, L, H].
Form = Callable[[torch.Tensor], Any]
# Arguments of blocks that concern the cache, by the names that architectures give them.
_OF_THE_CACHE = ("past_key_values", "past_key_value", "layer_past", "use_cache")


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
        return Batch(slice(0, 1), self.hidden[:1].to(self.device), self._kwargs[1][self.block])

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
    if 1 not in kwargs:
        kwargs[1] = [_moved(block, place) for block in _enter(model, samples[:1].to(home))[1]]
    return Activations(hidden, kwargs, place, spill)


def embedding_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go."""
    return cast(torch.Tensor, model.get_input_embeddings().weight).device


def _enter(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """What enters the first block, and what each block takes."""
    blocks = find_blocks(model)[1]
    entered: list[torch.Tensor] = []
    taken: list[dict[str, Any]] = []

    def pass_on(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        entered.append(hidden_states)
        taken.append({name: value for name, value in kwargs.items() if name not in _OF_THE_CACHE})
        if len(entered) == len(blocks):
            raise Stop
        return hidden_states

    with blocks_replaced_by(blocks, pass_on, output_form(model)), contextlib.suppress(Stop):
        model(input_ids=ids, use_cache=False)
    return entered[0], taken


def output_form(model: PreTrainedModel) -> Form:
    """What the model expects of a block: the hidden states [B, L, H] alone, or as the first of a tuple.

    Of the model, its ends are enough. QuasarError where its blocks cannot be run one by one.
    """
    blocks = find_blocks(model)[1]
    ids = torch.zeros(1, 3, dtype=torch.long, device=embedding_device(model))
    forms: tuple[Form, ...] = (lambda hidden: hidden, lambda hidden: (hidden, None))
    for form in forms:
        with (
            blocks_replaced_by(blocks, lambda hidden, **_: hidden, form),
            contextlib.suppress(IndexError, RuntimeError, TypeError, ValueError),
        ):
            if model(input_ids=ids, use_cache=False).logits.shape[:2] == ids.shape:
                return form
    raise QuasarError(
        f"{type(model).__name__} hands its blocks more than hidden states: it cannot be quantized block by block."
    )


@contextlib.contextmanager
def blocks_replaced_by(blocks: torch.nn.ModuleList, forward: Callable[..., torch.Tensor], form: Form) -> Iterator[None]:
    """Let all blocks run another function, which takes all but the hidden states by name."""
    for block in blocks:
        block.forward = functools.partial(_call_by_name, type(block).forward, forward, form)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own again


def _call_by_name(
    own: Callable[..., Any], forward: Callable[..., torch.Tensor], form: Form, *args: Any, **kwargs: Any
) -> Any:
    """Call `forward` with the arguments of a block's own function, given by position or by name."""
    first, *names = list(inspect.signature(own).parameters)[1:]
    hidden = args[0] if args else kwargs.pop(first)
    return form(forward(hidden, **dict(zip(names, args[1:], strict=False)), **kwargs))


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
