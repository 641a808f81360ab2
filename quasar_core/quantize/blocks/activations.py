"""The activations of the calibration text, block by block; outputs of modules that are already quantized are cached.

Hidden states are held once, read and written batch by batch. Attention and MLP each end in one linear layer (o_proj,
down_proj): once that is solved, nothing in the module changes any more, so its output for the whole text is cached,
and stands in for the module in every later pass of the block. Letters: N rows of L tokens, B rows of a batch, H
hidden.
"""

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from quasar_core.errors import QuasarError, foreign_errors
from quasar_core.quantize.blocks.streaming import find_blocks
from quasar_core.quantize.solve.matmul import FastPasses, product


@dataclass(frozen=True)
class Ending:
    """A module whose output is that of its last layer: alone, or first in a tuple of this length with `None` behind.

    `feeders` are modules whose outputs nothing but this module reads.
    """

    module: str
    layer: str
    length: int | None = None
    feeders: tuple[str, ...] = ()

    def outputs(self, output: torch.Tensor) -> dict[str, Any]:
        """What the module gives when the layer gives this, and for what it reads, values that would be noticed."""
        unread = output.new_full((1,), float("nan")).expand_as(output)
        whole = output if self.length is None else (output, *[None] * (self.length - 1))
        return {**dict.fromkeys(self.feeders, unread), self.module: whole}


def first_output(output: Any) -> torch.Tensor:
    """The tensor that a module gives, alone or first in a tuple."""
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


class KeptOutputs:
    """Outputs of a block's finished modules for the whole text; `spill` begins the names of files that hold them.

    Without it they lie in memory. Before a module is finished, what its last layer reads is kept in their place.
    """

    def __init__(self, rows: int, batch_rows: int, spill: Path | None) -> None:
        self._rows, self._batch_rows, self._spill = rows, batch_rows, spill
        self._values: dict[str, torch.Tensor] = {}  # [N, L, the wider of the layer's inputs and outputs], by module
        self._finished: dict[str, tuple[Ending, int]] = {}  # with the width of the output

    def keep(self, ending: Ending, rows: slice, values: torch.Tensor, width: int) -> None:
        """Hold values [B, L, ·] of some rows, where values of that width will find room."""
        shape = (self._rows, values.shape[1], max(width, values.shape[-1]))
        room = self._values.get(ending.module)
        if room is None or room.shape != shape or room.dtype != values.dtype:
            del room
            self._drop(ending.module)
            self._values[ending.module] = allocate(shape, values.dtype, self._file(ending.module))
        self._values[ending.module][rows, :, : values.shape[-1]] = values

    def finish(self, ending: Ending, layer: torch.nn.Linear) -> None:
        """Turn what the last layer reads into what it gives, batch by batch."""
        values = self._values[ending.module]
        for rows in values.split(self._batch_rows):
            inputs = rows[..., : layer.in_features].contiguous()
            rows[..., : layer.out_features] = product(inputs, layer.weight, layer.bias)
        self.finished(ending, layer.out_features)

    def finished(self, ending: Ending, width: int) -> None:
        """From now on the values kept, of that width, are the module's outputs."""
        self._finished[ending.module] = ending, width

    def of(self, rows: slice, device: torch.device) -> dict[str, Any]:
        """What every finished module gives for some rows."""
        outputs: dict[str, Any] = {}
        for module, (ending, width) in self._finished.items():
            outputs |= ending.outputs(self._values[module][rows, :, :width].to(device).contiguous())
        return outputs

    def forget(self) -> None:
        """The next block comes, whose modules take the room of this one's."""
        for module in self._values.keys() - self._finished.keys():
            self._drop(module)
        self._finished.clear()

    def clear(self) -> None:
        """The last block is done: memory is freed, and files are removed."""
        self._finished.clear()
        for module in list(self._values):
            self._drop(module)

    def _drop(self, module: str) -> None:
        file = self._file(module)
        if self._values.pop(module, None) is not None and file is not None:
            file.unlink()

    def _file(self, module: str) -> Path | None:
        return None if self._spill is None else self._spill.with_name(f"{self._spill.name}-{module}")


@contextlib.contextmanager
def standing_in(block: torch.nn.Module, outputs: Mapping[str, Any]) -> Iterator[None]:
    """Let modules of a block, by name, give these outputs without running."""
    modules = [(block.get_submodule(name), output) for name, output in outputs.items()]
    for module, output in modules:
        module.forward = lambda *_, output=output, **__: output
    try:
        yield
    finally:
        for module, _ in modules:
            del module.forward  # the class's own again


def allocate(shape: tuple[int, ...], dtype: torch.dtype, spill: Path | None) -> torch.Tensor:
    """An empty tensor in memory, or in a file of that name, whose pages the system may write out."""
    if spill is None:
        return torch.empty(shape, dtype=dtype)
    size = torch.Size(shape).numel()
    with foreign_errors(f"{spill} could not be written"), spill.open("wb") as file:
        # Room that turns out to be missing later would end the process, so it is taken now where the system can.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
        else:
            file.truncate(size * dtype.itemsize)
    return torch.from_file(str(spill), shared=True, size=size, dtype=dtype).view(shape)


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
