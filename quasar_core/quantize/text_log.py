"""The text that a model writes, kept on the disk as it is written, so that a run that ends goes on where it was.

A log is of one batch of rows: a line of JSON that tells which, with its check sum, then records, appended and synced
every few seconds. A record holds new columns, tokens among them, and what their passes have left: keys and values. With
these, every later step computes what it would have computed, to the last bit. Passing the tokens anew would be another
product, with other rounding. Letters: B rows of a batch, T positions of a record.
"""

import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load

from quasar_core.checkpoint.writer import pieces_of
from quasar_core.errors import QuasarError
from quasar_core.files import sync
from quasar_core.page_cache import forget
from quasar_core.quantize.kept_text import keep_text, read_text
from quasar_core.quantize.text_writers import Rows

SECONDS = 2.0  # of work that may be lost
SHARE = 20  # of the time goes at most one part in so many into keeping
TOKENS = "tokens"  # the column that every batch has
_HEAD = 12  # bytes before a record: its length, and its check sum
Columns = dict[str, list[torch.Tensor]]  # by name, what a batch has of each position: tokens [B], others of some rows


class TextLog:
    """One batch's log; `identity` is what a resumed batch must share with the one that began."""

    def __init__(self, folder: Path, name: str, identity: dict[str, Any]) -> None:
        self._path, self._whole = folder / f"{name}.log", folder / f"{name}.safetensors"
        self._identity = json.dumps(identity, sort_keys=True)
        self._kept = 0  # positions on the disk
        self._next = time.monotonic() + SECONDS

    @property
    def _first_line(self) -> bytes:
        return _line_of(self._identity)

    def finished(self) -> dict[str, torch.Tensor] | None:
        """Read the columns of a batch that was written to its end, positions beside one another."""
        if not self._whole.exists():
            return None
        tensors = read_text(self._whole, "delete it, and it is made anew")
        identity = tensors.pop("identity", torch.empty(0))
        return tensors if identity.tolist() == list(self._identity.encode()) else None

    def resume(self, columns: Columns, rows: Rows, device: torch.device) -> bool:
        """Fill the columns so far, and the rows as they were behind them; whether anything was kept."""
        end_of_last = 0
        for record, end in self._records():
            end_of_last = end
            for name, column in columns.items():
                column += record.pop(name).to(device).unbind(dim=1)
            rows.append(record)
        if end_of_last:
            os.truncate(self._path, end_of_last)  # what was not written whole goes
        else:
            self._path.unlink(missing_ok=True)
        self._kept = len(columns[TOKENS])
        return end_of_last > 0

    def keep(self, columns: Columns, rows: Rows) -> None:
        """Append what is new, once in a while: columns of positions that were passed. Raises OSError."""
        begin = time.monotonic()
        if begin < self._next:
            return
        states = rows.states(self._kept, len(columns[TOKENS]))
        if states is None:
            return
        record = {name: part.cpu().contiguous() for name, part in states.items()}
        record |= {name: torch.stack(column[self._kept :], dim=1).cpu() for name, column in columns.items()}
        self._append(record)
        self._kept = len(columns[TOKENS])
        now = time.monotonic()
        self._next = now + max(SECONDS, SHARE * (now - begin))

    def finish(self, columns: Mapping[str, torch.Tensor]) -> None:
        """Keep a batch that is written to its end, as `finished` reads it."""
        self._path.parent.mkdir(exist_ok=True)
        identity = torch.tensor(list(self._identity.encode()), dtype=torch.uint8)
        keep_text(self._whole, {**columns, "identity": identity})
        self._path.unlink(missing_ok=True)

    def _append(self, record: Mapping[str, torch.Tensor]) -> None:
        self._path.parent.mkdir(exist_ok=True)
        begins = not self._path.exists()
        parts, check = list(pieces_of(record)), 0
        for part in parts:
            check = zlib.crc32(part, check)
        with self._path.open("ab") as file:
            if begins:
                file.write(self._first_line)
            file.write(sum(map(len, parts)).to_bytes(_HEAD - 4, "little") + check.to_bytes(4, "little"))
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
            forget(file.fileno())  # new pages for the next record would take longer than the disk
        if begins:
            sync(self._path.parent)

    def _records(self) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
        """Read every whole record of a log of this identity, and where it ends in the file."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            if file.readline() != self._first_line:
                return
            while (record := _read_record(file)) is not None:
                yield load(record), file.tell()


def kept_batch(folder: Path, name: str) -> dict[str, Any] | None:
    """The identity of a batch that an earlier run has begun or finished; None where nothing of one can be read."""
    whole, log = folder / f"{name}.safetensors", folder / f"{name}.log"
    try:
        if whole.exists():
            identity = bytes(read_text(whole, "")["identity"].tolist()).decode()
        else:
            with log.open("rb") as file:
                line = file.readline()
            identity = line.rpartition(b" ")[0].decode()
            if _line_of(identity) != line:
                return None
        found: dict[str, Any] = json.loads(identity)
    except (OSError, QuasarError, KeyError, ValueError):
        return None  # whoever reads the batch itself tells what is wrong with it
    return found


def _line_of(identity: str) -> bytes:
    """The first line of a log: its identity, and the check sum of that."""
    return f"{identity} {zlib.crc32(identity.encode()):08x}\n".encode()


def _read_record(file: BinaryIO) -> bytes | None:
    """Read the next record; None at the end, and where the process ended while it wrote one."""
    head = file.read(_HEAD)
    length = int.from_bytes(head[:-4], "little")
    if len(head) < _HEAD or length > os.fstat(file.fileno()).st_size:
        return None
    record = file.read(length)
    return record if len(record) == length and zlib.crc32(record) == int.from_bytes(head[-4:], "little") else None
