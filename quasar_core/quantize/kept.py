"""Within a block, what has run once and need not run again: the outputs of modules whose layers are all solved.

Attention and MLP end in a layer of their own (o_proj, down_proj). Once that is solved, nothing in the module changes
any more, so its output for the whole text is kept, and stands in for the module in every later pass of the block.
Letters: N rows of L tokens, B rows of a batch.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quasar_core.foreign import foreign_errors
from quasar_core.quantize.products import product


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
