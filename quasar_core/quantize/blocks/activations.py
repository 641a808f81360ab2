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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from quasar_core.errors import QuasarError, foreign_errors
from quasar_core.quantize.blocks.norms import fused_norms
from quasar_core.quantize.blocks.streaming import find_blocks
from quasar_core.quantize.blocks.target_context import TargetContext
from quasar_core.quantize.solve.matmul import FastPasses, product


@dataclass(frozen=True)
class OutputLayer:
    """The last layer of a module, with the same output: alone, or first in a tuple of this length, else `None`s.

    `feeders` are modules whose outputs this module alone reads.
    """

    module: str
    layer: str
    length: int | None = None
    feeders: tuple[str, ...] = ()

    def outputs(self, output: torch.Tensor) -> dict[str, Any]:
        """Return the module's output for this one of the layer, and NaN for its feeders: a read of it would show."""
        unread = output.new_full((1,), float("nan")).expand_as(output)
        whole = output if self.length is None else (output, *[None] * (self.length - 1))
        return {**dict.fromkeys(self.feeders, unread), self.module: whole}


def first_output(output: Any) -> torch.Tensor:
    """Return the tensor of a module's output, alone or first in a tuple."""
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


class ModuleCache:
    """Cache of the outputs of a block's quantized modules, for the whole text; in files whose names begin with `spill`.

    Without `spill` it lies in memory. Until a module is quantized, the cache holds the inputs of its last layer.
    """

    def __init__(self, rows: int, batch_rows: int, spill: Path | None) -> None:
        self._rows, self._batch_rows, self._spill = rows, batch_rows, spill
        self._values: dict[str, torch.Tensor] = {}  # [N, L, the wider of the layer's inputs and outputs], by module
        self._finished: dict[str, tuple[OutputLayer, int]] = {}  # with the width of the output

    def store(self, output_layer: OutputLayer, rows: slice, values: torch.Tensor, width: int) -> None:
        """Store values [B, L, ·] of some rows, with room for values of that width."""
        shape = (self._rows, values.shape[1], max(width, values.shape[-1]))
        room = self._values.get(output_layer.module)
        if room is None or room.shape != shape or room.dtype != values.dtype:
            del room
            self._drop(output_layer.module)
            self._values[output_layer.module] = allocate(shape, values.dtype, self._file(output_layer.module))
        self._values[output_layer.module][rows, :, : values.shape[-1]] = values

    def finish(self, output_layer: OutputLayer, layer: torch.nn.Linear) -> None:
        """Replace the inputs of the last layer by its outputs, batch by batch."""
        values = self._values[output_layer.module]
        for rows in values.split(self._batch_rows):
            inputs = rows[..., : layer.in_features].contiguous()
            rows[..., : layer.out_features] = product(inputs, layer.weight, layer.bias)
        self.mark_finished(output_layer, layer.out_features)

    def mark_finished(self, output_layer: OutputLayer, width: int) -> None:
        """Declare the stored values, of that width, to be the module's outputs."""
        self._finished[output_layer.module] = output_layer, width

    def outputs(self, rows: slice, device: torch.device) -> dict[str, Any]:
        """Return the outputs of every finished module for some rows, by module."""
        outputs: dict[str, Any] = {}
        for module, (output_layer, width) in self._finished.items():
            outputs |= output_layer.outputs(self._values[module][rows, :, :width].to(device).contiguous())
        return outputs

    def begin_block(self) -> None:
        """Begin the next block, whose modules reuse this one's memory."""
        for module in self._values.keys() - self._finished.keys():
            self._drop(module)
        self._finished.clear()

    def clear(self) -> None:
        """Free the memory and remove the files."""
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
def replaced_outputs(block: torch.nn.Module, outputs: Mapping[str, Any]) -> Iterator[None]:
    """Let modules of a block, by name, return these outputs without running."""
    modules = [(block.get_submodule(name), output) for name, output in outputs.items()]
    for module, output in modules:
        module.forward = lambda *_, output=output, **__: output
    try:
        yield
    finally:
        for module, _ in modules:
            del module.forward  # the class's own again


def allocate(shape: tuple[int, ...], dtype: torch.dtype, spill: Path | None) -> torch.Tensor:
    """Allocate a tensor in memory, or in a file of that name, whose pages the system may write out."""
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


# The most tokens of a batch, and values of its hidden states: as many as fit a processor's caches.
BATCH_TOKENS, BATCH_VALUES = 2048, 2**21


# One of so many rows of the text reads the target's keys and values, as `exact` does; the others the verifier's.
CONTEXT_EVERY = 2


# Wraps hidden states [B, L, H] as a block returns them.
Form = Callable[[torch.Tensor], Any]
# Arguments of blocks that concern the KV cache, by the names that architectures give them.
_OF_THE_CACHE = ("past_key_values", "past_key_value", "layer_past", "cache_params", "cache", "use_cache")


class Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


@dataclass(frozen=True)
class Batch:
    """Rows of the text: the next block's hidden states [B, L, H] and other arguments.

    `outputs` are the cached outputs of its quantized modules, by name; its attention runs inside `attention`.
    """

    rows: slice
    hidden: torch.Tensor
    kwargs: dict[str, Any]
    outputs: Mapping[str, Any] = field(default_factory=dict)
    attention: contextlib.AbstractContextManager[Any] = field(default_factory=contextlib.nullcontext)


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
        self.context_every = 0  # one of so many rows reads the reference's keys and values; none where there is none
        self._kwargs = kwargs  # of each block, by the rows of a batch
        self._rows = max(kwargs)
        self.cache = ModuleCache(len(hidden), self._rows, spill)

    def keep_reference(self, spill: Path | None = None, context_every: int = CONTEXT_EVERY) -> None:
        """Copy the hidden states, to run the copy through the full-precision blocks.

        One of `context_every` rows reads its keys and values, none where that is 0.
        """
        self.context_every = context_every
        hidden = allocate(tuple(self.hidden.shape), self.hidden.dtype, spill)
        self.reference = Activations(hidden.copy_(self.hidden), self._kwargs, self.device, spill)

    def batches(self) -> Iterator[Batch]:
        """Iterate over all rows, on the device, a few at a time."""
        for begin in range(0, len(self.hidden), self._rows):
            yield self._batch(slice(begin, min(begin + self._rows, len(self.hidden))))

    def fork(self) -> "Activations":
        """Copy the hidden states in memory, to run other variants of the remaining blocks."""
        copied = Activations(self.hidden.clone(), self._kwargs, self.device)
        copied.block = self.block
        return copied

    def pairs(self, context: TargetContext, windows: bool = False) -> Iterator[tuple[Batch, Batch]]:
        """Iterate over the batches, each with the reference's batch of the same rows, which is to run first.

        One of `context_every` rows reads the keys and values that the reference leaves in the context; or all do, but
        for those of a token's own window.
        """
        assert self.reference is not None
        for batch, reference in zip(self.batches(), self.reference.batches(), strict=True):
            if windows:
                attention: contextlib.AbstractContextManager[Any] = context.read_in_windows()
            elif self.context_every:
                attention = context.read((-1 - batch.rows.start) % self.context_every, self.context_every)
            else:
                attention = contextlib.nullcontext()
            yield replace(batch, attention=attention), replace(reference, attention=context.note())

    def first_row(self) -> Batch:
        """Return a batch of one row."""
        return Batch(slice(0, 1), self.hidden[:1].to(self.device), self._kwargs[1][self.block])

    def advance(self, block: torch.nn.Module) -> None:
        """Run a block: its outputs replace its inputs, and the block after it comes next."""
        for batch in self.batches():
            self.hidden[batch.rows] = run_block(block, batch).to(self.hidden)
        self.end_block()

    def advance_both(self, block: torch.nn.Module, original: torch.nn.Module, windows: bool = False) -> bool:
        """Run the reference through the original block, and the activations through the quantized one.

        Returns whether there was attention whose keys and values could be read.
        """
        assert self.reference is not None
        context = TargetContext()
        for batch, reference in self.pairs(context, windows):
            self.reference.hidden[reference.rows] = run_block(original, reference).to(self.hidden)
            self.hidden[batch.rows] = run_block(block, batch).to(self.hidden)
        self.reference.end_block()
        self.end_block()
        return bool(context.noted)

    def end_block(self) -> None:
        """The block after this one comes next."""
        self.cache.begin_block()
        self.block += 1
        if self.block == len(self._kwargs[self._rows]):
            self.cache.clear()

    def _batch(self, rows: slice) -> Batch:
        kwargs = self._kwargs[rows.stop - rows.start][self.block]
        return Batch(rows, self.hidden[rows].to(self.device), kwargs, self.cache.outputs(rows, self.device))


def run_block(block: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return the block's outputs [B, L, H]."""
    with FastPasses(), batch.attention, replaced_outputs(block, batch.outputs), fused_norms(block):
        return first_output(block(batch.hidden, **batch.kwargs))


def batch_tokens(hidden: int, on_device: bool) -> int:
    """Return the tokens of a batch, where rows are shorter; a GPU has room for the most."""
    return BATCH_TOKENS if on_device else max(1, min(BATCH_TOKENS, BATCH_VALUES // hidden))


@torch.inference_mode()
def capture_first_inputs(
    model: PreTrainedModel, samples: torch.Tensor, device: torch.device | None = None, spill: Path | None = None
) -> Activations:
    """Compute the inputs of the first block for samples [N, L]; of the model, the embedding is enough.

    Blocks run on `device`. QuasarError where a block has other arguments that depend on the text: they are not stored.
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
    """Return the device of the embedding."""
    return cast(torch.Tensor, model.get_input_embeddings().weight).device


def _enter(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Return the first block's hidden states, and the other arguments of each block."""
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
    """Find what the model expects a block to return: the hidden states [B, L, H] alone, or as the first of a tuple.

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
    """Let all blocks run another function, which takes all arguments but the hidden states by name."""
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
    first, *names = parameter_names(own)
    hidden = args[0] if args else kwargs.pop(first)
    return form(forward(hidden, **dict(zip(names, args[1:], strict=False)), **kwargs))


@functools.cache
def parameter_names(method: Callable[..., Any]) -> tuple[str, ...]:
    """Name what a method takes beside the instance; found once, as blocks are called tens of thousands of times."""
    return tuple(inspect.signature(method).parameters)[1:]


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    return value


def _same(one: Any, other: Any) -> bool:
    """Compare arguments of two batches."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return True
