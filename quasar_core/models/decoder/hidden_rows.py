"""The rows that a decoder's head reads, kept beside a cache for heads that predict further tokens (`drafting/mtp.py`).

Letters: T tokens of a pass, in the hidden size.
"""

from collections.abc import Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import torch


class Rows(Protocol):
    """Where a pass leaves its rows [T, in] behind the last norm."""

    def place(self, start: int, count: int) -> torch.Tensor:
        """Where the rows of a pass of `count` tokens at `start` are written: [T, in], contiguous."""
        ...

    def mark(self, start: int, count: int) -> None:
        """They have been written."""
        ...


class HiddenRows:
    """A row [in] for each position: that of whoever passed it last, as in the cache, with whose length they go back.

    What lies behind that length is of no use to a pass, and may hold what a draft goes on from.
    """

    def __init__(self, capacity: int, size: int, device: torch.device, dtype: torch.dtype) -> None:
        self.values = torch.zeros(capacity, size, device=device, dtype=dtype)
        self._changed: WeakKeyDictionary[object, int] = WeakKeyDictionary()  # by reader

    def place(self, start: int, count: int) -> torch.Tensor:
        """See `Rows`."""
        return self.values[start : start + count]

    def mark(self, start: int, count: int) -> None:
        """See `Rows`."""
        for reader, changed in self._changed.items():
            self._changed[reader] = min(changed, start)

    def keep(self, start: int, nodes: Sequence[int]) -> None:
        """Keep these nodes, a path, of a tree that was passed at `start`, as the positions from `start` on."""
        for place, node in enumerate(nodes):
            if place != node:
                self.values[start + place] = self.values[start + node]

    def changed(self, reader: object) -> int:
        """The first position that was written since this reader asked last; the capacity where none was."""
        first = self._changed.get(reader, 0)
        self._changed[reader] = len(self.values)
        return first


class LastRow:
    """The row [in] of the last token of the last pass alone."""

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype) -> None:
        self._room = torch.zeros(1, size, device=device, dtype=dtype)
        self.value = self._room[0]

    def place(self, start: int, count: int) -> torch.Tensor:
        """See `Rows`."""
        if len(self._room) < count:
            self._room = self._room.new_zeros(count, self._room.shape[1])
        return self._room[:count]

    def mark(self, start: int, count: int) -> None:
        """See `Rows`."""
        self.value = self._room[count - 1]
