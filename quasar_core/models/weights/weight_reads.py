"""Read stored weights straight to their places in memory, in long reads, and leave nothing of the files behind.

Weights that lie one behind the other in a file are read together, whatever the order of their places: a disk gives the
more bytes a second the longer a read is. They pass by the system's page cache (`direct_reads.py`). Where that cannot
be, what was read leaves it at once: it would push out what stays in memory, and remains of it keep the system from
reading ahead when the same place is read again.
"""

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quasar_core.checkpoint import float8_blocks
from quasar_core.errors import QuasarError, reason
from quasar_core.models.weights.direct_reads import DirectFile, EndOfFile
from quasar_core.page_cache import forget
from quasar_core.store.safetensors_header import TensorEntry

PIECE_BYTES = 8 << 20  # of one read through the page cache
MOST_BUFFERS = 1024  # that one read fills: the system refuses more
AHEAD = 32 << 20  # that a system may read ahead
# Linux keeps pages in groups of up to some megabytes, and lets go of whole groups alone: one that a read has ended in
# leaves with a later one.
BEHIND = 32 << 20
REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)  # of reads that are direct
SMALL_GAP = 256 << 10  # bytes between two weights that are read and thrown away: a seek costs more
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    float8_blocks.STORED: torch.float8_e4m3fn,
}
PARTS = {"U8": torch.uint8, "I32": torch.int32}  # of weights in 12 bits (`compressed_files.py`)


class OpenFile:
    """A file of weights that is read again and again, and must stay as it is meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not hasattr(os, "preadv"):
            raise QuasarError("Models larger than the memory run on Linux and macOS alone; on Windows, use WSL.")
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise QuasarError(f"{path} cannot be read: {reason(error)}.") from error
        self._state, self._end = self._look(), 0
        self._direct = DirectFile.open(path)

    @property
    def direct(self) -> bool:
        """Whether reads pass by the system's page cache."""
        return self._direct is not None

    def __del__(self) -> None:
        """Close it."""
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def check(self) -> None:
        """QuasarError where the file is another one by now: its size, or when it was written."""
        if self._look() != self._state:
            raise QuasarError(f"{self.path} was changed while its weights were in use: start again with whole files.")

    def check_place(self) -> None:
        """QuasarError where another file stands in its place by now, or it was changed."""
        try:
            same = os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except OSError as error:
            raise QuasarError(f"{self.path} cannot be read: {reason(error)}.") from error
        if not same:
            raise replaced(self.path)
        self.check()

    def read(self, start: int, *buffers: memoryview) -> None:
        """Fill buffers, one after another, from `start` on; QuasarError where the system refuses or the file ends."""
        left = [buffer for buffer in buffers if len(buffer)]
        try:
            if not self._read_directly(start, left):
                self._read_through_cache(start, left)
        except EndOfFile as error:
            raise QuasarError(
                f"{self.path} is cut short: it has no byte {error.place}, where weights should be."
            ) from error
        except OSError as error:
            raise QuasarError(f"{self.path} cannot be read: {reason(error)}.") from error

    def _read_directly(self, start: int, buffers: Sequence[memoryview]) -> bool:
        """False where the file system turns out to refuse that; it may open a file so and refuse its reads."""
        if self._direct is None:
            return False
        try:
            self._direct.read(start, buffers)
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            self._direct = None
            return False
        except EndOfFile:  # a network's file system may give less than a sector: the other way tells whether it ends
            return False
        forget(self._descriptor, start, sum(map(len, buffers)))  # some file systems answer from the cache all the same
        return True

    def _read_through_cache(self, start: int, left: list[memoryview]) -> None:
        if not 0 <= start - self._end <= SMALL_GAP:  # the system has read on behind the last read, in vain
            self._forget(self._end + AHEAD)
        while left:
            count = os.preadv(self._descriptor, _first_bytes(left, PIECE_BYTES), start)
            if count == 0:
                raise EndOfFile(start)
            self._end = start = start + count
            self._forget(start)
            left = _behind(left, count)

    def _forget(self, until: int) -> None:
        """Drop what was read last, up to that byte, from the page cache."""
        begin = max(self._end - PIECE_BYTES - BEHIND, 0)
        forget(self._descriptor, begin, until - begin)

    def _look(self) -> tuple[int, int]:
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns


def replaced(path: Path) -> QuasarError:
    """Another file has come into the place of one whose header was read."""
    return QuasarError(f"{path} was replaced while its weights were loaded: start again with whole files.")


def _first_bytes(buffers: Sequence[memoryview], most: int) -> list[memoryview]:
    """What a read of at most so many bytes fills."""
    found = []
    for buffer in buffers[:MOST_BUFFERS]:
        found.append(buffer[:most])
        most -= len(found[-1])
        if most == 0:
            break
    return found


def _behind(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is still to be filled behind the first `count` bytes."""
    for index, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[index + 1 :]]
        count -= len(buffer)
    return []


@dataclass
class StoredWeight:
    """A weight in a file, and its place in memory, of another dtype perhaps, or of more rows that are all alike."""

    entry: TensorEntry
    file: OpenFile
    place: torch.Tensor
    scales: torch.Tensor | None = None  # of blocks of 8-bit floats
    block: tuple[int, int] = float8_blocks.BLOCK

    @property
    def as_stored(self) -> bool:
        """Whether its place takes the bytes as they are."""
        same = self.place.shape == self.entry.shape and (DTYPES | PARTS)[self.entry.dtype] == self.place.dtype
        return same and self.place.is_contiguous()

    def read(self) -> None:
        """Bring it from the file to its place."""
        if self.as_stored:
            self.file.read(self.entry.start, _bytes_of(self.place))
            return
        stored = torch.empty(self.entry.shape, dtype=DTYPES[self.entry.dtype])
        self.file.read(self.entry.start, _bytes_of(stored))
        if self.scales is not None:
            stored = float8_blocks.dequantize(self.entry.name, stored, self.scales, self.block)
        self.place.copy_(stored)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def read_weights(weights: Iterable[StoredWeight]) -> None:
    """Bring all to their places, in the order of the files; QuasarError where a file has changed meanwhile."""
    files = dict[OpenFile, None]()
    for run in runs_of(weights):
        files[run[0].file] = None
        if len(run) == 1:
            run[0].read()
        else:
            run[0].file.read(run[0].entry.start, *_buffers_of(run))
    for file in files:
        file.check()


def runs_of(weights: Iterable[StoredWeight]) -> Iterator[list[StoredWeight]]:
    """Weights that one read can bring: those of a file that lie together, and need no conversion."""
    run: list[StoredWeight] = []
    for weight in sorted(weights, key=lambda weight: (weight.file.path, weight.entry.start)):
        if run and not _follows(run[-1], weight):
            yield run
            run = []
        run.append(weight)
    if run:
        yield run


def _follows(one: StoredWeight, next_one: StoredWeight) -> bool:
    gap = next_one.entry.start - one.entry.start - one.entry.size
    return one.file is next_one.file and one.as_stored and next_one.as_stored and 0 <= gap <= SMALL_GAP


def _buffers_of(run: Sequence[StoredWeight]) -> Iterator[memoryview]:
    """The places of a run's weights, and room for what lies between them."""
    end = run[0].entry.start
    for weight in run:
        if weight.entry.start > end:
            yield memoryview(bytearray(weight.entry.start - end))
        yield _bytes_of(weight.place)
        end = weight.entry.start + weight.entry.size
