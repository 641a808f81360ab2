"""The text that a model writes, kept on the disk as it is written, so that a run that ends goes on where it was.

A log is of one batch of rows: a line of JSON that tells which, then records, appended and synced every few seconds.
A record holds new tokens, their keys and values, and the state of the draws; with these, every later step computes
what it would have computed, to the last bit. Passing the tokens anew would be another product, with other rounding.
Letters: B rows of a batch, T positions of a record.
"""

import json
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save

from quasar_core.checkpoint.writer import save_tensors
from quasar_core.errors import QuasarError
from quasar_core.files import sync
from quasar_core.models.hf.cache import PreallocatedCache

SECONDS = 2.0  # of work that may be lost
SHARE = 20  # of the time goes at most one part in so many into keeping
_HEAD = 12  # bytes before a record: its length, and its check sum


class TextLog:
    """One batch's log; `identity` is what a resumed batch must share with the one that began."""

    def __init__(self, folder: Path, name: str, identity: dict[str, Any]) -> None:
        self._path, self._whole = folder / f"{name}.log", folder / f"{name}.safetensors"
        self._identity = json.dumps(identity, sort_keys=True)
        self._kept = 0  # positions on the disk
        self._next = time.monotonic() + SECONDS

    @property
    def _first_line(self) -> bytes:
        return self._identity.encode() + b"\n"

    def finished(self) -> torch.Tensor | None:
        """Read the tokens [B, L] of a batch that was written to its end."""
        if not self._whole.exists():
            return None
        try:
            tensors = load_file(self._whole)
            same = bytes(tensors["identity"].tolist()).decode() == self._identity
        except (SafetensorError, KeyError, ValueError) as error:
            raise QuasarError(f"{self._whole} is not readable ({error}): delete it, and it is made anew.") from error
        return tensors["tokens"] if same else None

    def resume(self, cache: PreallocatedCache, generator: torch.Generator) -> list[torch.Tensor]:
        """Read the tokens so far, each position [B, 1]; cache and draws become what they were after the last one."""
        tokens: list[torch.Tensor] = []
        end_of_last = 0
        for record, end in self._records():
            end_of_last = end
            tokens += record["tokens"].to(generator.device).split(1, dim=1)
            for index, layer in enumerate(cache.decoder_layers):
                if f"keys.{index}" in record:
                    keys, values = (record[f"{part}.{index}"].to(generator.device) for part in ("keys", "values"))
                    layer.update(keys, values)
            generator.set_state(record["draws"])
        if end_of_last:
            os.truncate(self._path, end_of_last)  # what was not written whole goes
        else:
            self._path.unlink(missing_ok=True)
        self._kept = len(tokens)
        return tokens

    def keep(self, tokens: Sequence[torch.Tensor], cache: PreallocatedCache, generator: torch.Generator) -> None:
        """Append what is new, once in a while: tokens that were passed, [B, 1] each. Raises OSError."""
        begin = time.monotonic()
        if begin < self._next:
            return
        record = {"tokens": torch.cat(list(tokens[self._kept :]), dim=1).cpu(), "draws": generator.get_state()}
        for index, layer in enumerate(cache.decoder_layers):
            if layer.is_initialized:
                for part in ("keys", "values"):
                    new = getattr(layer, part)[:, :, self._kept : len(tokens)]
                    record[f"{part}.{index}"] = new.cpu().contiguous()
        self._append(save(record))
        self._kept = len(tokens)
        now = time.monotonic()
        self._next = now + max(SECONDS, SHARE * (now - begin))

    def finish(self, tokens: torch.Tensor) -> None:
        """Keep a batch that is written to its end, tokens [B, L]."""
        self._path.parent.mkdir(exist_ok=True)
        identity = torch.tensor(list(self._identity.encode()), dtype=torch.uint8)
        save_tensors(self._whole, {"tokens": tokens, "identity": identity})
        self._path.unlink(missing_ok=True)

    def _append(self, record: bytes) -> None:
        self._path.parent.mkdir(exist_ok=True)
        begins = not self._path.exists()
        with self._path.open("ab") as file:
            if begins:
                file.write(self._first_line)
            file.write(len(record).to_bytes(_HEAD - 4, "little") + zlib.crc32(record).to_bytes(4, "little"))
            file.write(record)
            file.flush()
            os.fsync(file.fileno())
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


def _read_record(file: BinaryIO) -> bytes | None:
    """Read the next record; None at the end, and where the process ended while it wrote one."""
    head = file.read(_HEAD)
    length = int.from_bytes(head[:-4], "little")
    if len(head) < _HEAD or length > os.fstat(file.fileno()).st_size:
        return None
    record = file.read(length)
    return record if len(record) == length and zlib.crc32(record) == int.from_bytes(head[-4:], "little") else None
