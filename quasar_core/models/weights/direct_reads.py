"""Read long stretches of a file past the system's page cache, where the file system permits it.

Through the cache the processor copies every page, the system reads ahead in vain wherever the next read does not follow
the last one, and what it keeps must be dropped again. In a direct read the disk writes into memory of ours, in whole
sectors. A stretch passes through two pieces in huge pages: memory of small pages would cut each request into many.
While one piece is copied to where it belongs, the next is read.

A fork of the program gets none of the pieces, and makes its own: where a process forks while the disk writes into its
memory, the bytes may go to the fork's copy of the pages alone (open(2), on O_DIRECT).
"""

import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import numpy as np

from quasar_core.kernels.cpu.huge_pages import new_room
from quasar_core.models.weights.background import Background

SECTOR = 4096  # bytes: places, lengths and memory of direct reads are whole ones on every common disk
PIECE_BYTES = 4 << 20
HUGE_PAGE = 2 << 20
Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


class EndOfFile(Exception):
    """A file has no byte where one is asked for."""

    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.place = place


class _Asked(NamedTuple):
    """A piece that is being read, from a place in the file on."""

    begin: int
    counted: Future[int]
    piece: Bytes


class _Pieces:
    """The two pieces that all files share, and the thread that reads into them."""

    lock = threading.Lock()
    pieces: tuple[Bytes, ...] = ()
    reader: Background | None = None

    @classmethod
    def begin(cls) -> None:
        """Make them, once."""
        if not cls.pieces:
            cls.pieces, cls.reader = (_piece(), _piece()), Background("quasar disk")

    @classmethod
    def begin_anew(cls) -> None:
        """In a fork: what was being read is lost, and whoever held the lock may not be there."""
        cls.lock, cls.pieces, cls.reader = threading.Lock(), (), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Pieces.begin_anew)


class DirectFile:
    """A file that is open for direct reads."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def open(cls, path: Path) -> "DirectFile | None":
        """None where the system or the file system has no direct reads.

        What is wrong with the file itself is told by whoever opens it the usual way.
        """
        if not hasattr(os, "O_DIRECT"):
            return None
        try:
            return cls(os.open(path, os.O_RDONLY | os.O_DIRECT))
        except OSError:
            return None

    def __del__(self) -> None:
        """Close it."""
        os.close(self._descriptor)

    def read(self, start: int, buffers: Sequence[memoryview]) -> None:
        """Fill buffers, one after another, from `start` on.

        EndOfFile where the file has fewer bytes; OSError, with EINVAL where direct reads are refused.
        """
        position, end, places, turn = start, start + sum(map(len, buffers)), _Places(buffers), 0
        with _Pieces.lock:
            _Pieces.begin()
            asked = self._ask(position, end, turn)
            while position < end:
                reached = min(asked.begin + asked.counted.result(), end)
                if reached <= position:
                    raise EndOfFile(position)
                arrived, turn = asked, 1 - turn
                if reached < end:
                    asked = self._ask(reached, end, turn)
                places.fill(arrived.piece[position - arrived.begin : reached - arrived.begin])
                position = reached

    def _ask(self, position: int, end: int, turn: int) -> _Asked:
        """Have a piece read that holds what is at `position`."""
        assert _Pieces.reader is not None
        begin, piece = position // SECTOR * SECTOR, _Pieces.pieces[turn]
        size = min(-(-(end - begin) // SECTOR) * SECTOR, PIECE_BYTES)
        return _Asked(begin, _Pieces.reader.submit(os.preadv, self._descriptor, [piece[:size].data], begin), piece)


class _Places:
    """Buffers that are filled one after another."""

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._left: Iterator[Bytes] = (np.frombuffer(buffer, np.uint8) for buffer in buffers if len(buffer))
        self._place: Bytes = np.empty(0, np.uint8)

    def fill(self, arrived: Bytes) -> None:
        """Copy what comes next of them; other threads run meanwhile."""
        while len(arrived):
            if not len(self._place):
                self._place = next(self._left)
            count = min(len(arrived), len(self._place))
            self._place[:count] = arrived[:count]
            self._place, arrived = self._place[count:], arrived[count:]


def _piece() -> Bytes:
    """Room for a piece, at the beginning of a huge page."""
    room = new_room(PIECE_BYTES + HUGE_PAGE)
    if hasattr(mmap, "MADV_DONTFORK"):
        room.madvise(mmap.MADV_DONTFORK)
    whole: Bytes = np.frombuffer(room, np.uint8)
    begin = -whole.ctypes.data % HUGE_PAGE
    piece = whole[begin : begin + PIECE_BYTES]
    piece[:] = 0
    return piece
