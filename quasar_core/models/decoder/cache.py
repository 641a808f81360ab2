"""The lean decoder's cache: keys and values of each layer, or the states of a recurrent one, and a length to move."""

import ctypes
import math
from collections.abc import Sequence

import torch

from quasar_core.errors import QuasarError
from quasar_core.kernels.cpu.huge_pages import empty_in_huge_pages
from quasar_core.models.config.block import BlockConfig
from quasar_core.models.decoder.hidden_rows import HiddenRows, Rows
from quasar_core.models.recurrent.rules import Recurrence
from quasar_core.models.recurrent.states import LayerStates
from quasar_core.models.rope import PromptLength


class DecoderCache(PromptLength):
    """Implements `models.base.KVCache`; a layer is one tensor [2, H, capacity, D], keys before values.

    The positions of a head lie next to each other, so attention reads it from end to end. A recurrent layer has states
    in the place of keys and values, of which those that decoding may go back to are kept. `rows` keeps what the head
    reads, where that is wanted; `given` [capacity, in] are the rows that a joint reads.
    """

    rows: Rows | None = None
    given: torch.Tensor | None = None

    def __init__(
        self,
        blocks: Sequence[BlockConfig],
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        recurrences: Sequence[Recurrence | None] | None = None,
    ) -> None:
        shapes = [(2, block.kv_heads, capacity, block.head_size) for block in blocks]
        sizes = [
            math.prod(shape) * (block.states_of == i)
            for i, (block, shape) in enumerate(zip(blocks, shapes, strict=True))
        ]
        parts = empty_in_huge_pages(sum(sizes), device=device, dtype=dtype).split(sizes)
        self.layers = [parts[block.states_of].view(shape) for block, shape in zip(blocks, shapes, strict=True)]
        self.addresses = (ctypes.c_void_p * len(blocks))(*(states.data_ptr() for states in self.layers))
        self.states = [
            None if rule is None else LayerStates(rule.empty(device, dtype))
            for rule in recurrences or [None] * len(blocks)
        ]
        self._length, self._capacity = 0, capacity

    @property
    def length(self) -> int:
        """Positions written."""
        return self._length

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return self._capacity

    def check_room(self, count: int) -> None:
        """Refuse a pass that would not fit."""
        if self._length + count > self._capacity:
            raise QuasarError(f"The cache holds {self._capacity} tokens, and {self._length + count} are needed.")

    def advance(self, count: int) -> None:
        """Count a finished pass of `count` positions."""
        self._stand_at(self._length + count)

    def keep(self, start: int, nodes: Sequence[int]) -> None:
        """Keep these nodes, a path, of a tree that was passed at `start`, as the positions from `start` on."""
        for place, node in enumerate(nodes):
            if place != node:  # a node lies behind every place before its own
                for states in self.layers:
                    states[:, :, start + place] = states[:, :, start + node]
        if isinstance(self.rows, HiddenRows):
            self.rows.keep(start, nodes)
        self.rollback(start + len(nodes))

    def rollback(self, length: int) -> None:
        """Move the length back; a length ahead of what is written is a defect of the caller."""
        if not 0 <= length <= self._length or self.reachable(length) < length:
            raise ValueError(f"cannot move a cache of {self._length} positions to {length}")
        self._stand_at(length)

    def _stand_at(self, length: int) -> None:
        self._length = length
        for states in self.states:
            if states is not None:
                states.stand = length

    def reachable(self, length: int) -> int:
        """See `models/rollback.py`; any position, where no layer is recurrent.

        A pass that ended midway leaves layers that know the states of different positions.
        """
        recurrent = [states for states in self.states if states is not None]
        while (farthest := min((states.reachable(length) for states in recurrent), default=length)) < length:
            length = farthest
        return length

    def settle(self, length: int) -> None:
        """See `models/rollback.py`."""
        for states in self.states:
            if states is not None:
                states.settled = length

    def begin(self, prompt_length: int) -> int:
        """See `TextCache`."""
        for states in self.states:
            if states is not None:
                states.settled, states.prompt_length = None, prompt_length
        return super().begin(prompt_length)
