"""What a safetensors file holds, read from its header alone: no weights, no torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quasar_core.errors import QuasarError

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor: dtype as safetensors names it ("BF16"), shape, and where its bytes lie in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int


def read_header(file: Path) -> list[TensorEntry]:
    """The tensors of one file, in the order of the header; QuasarError if it is not a whole safetensors file."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if not 2 <= length <= _MAX_HEADER_BYTES:
                raise ValueError("no header")
            header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        base = _LENGTH_BYTES + length
        entries = [_entry(name, stored, file, base) for name, stored in header.items()]
        if max((entry.start + entry.size for entry in entries), default=base) > file.stat().st_size:
            raise ValueError("cut short")
    except OSError as error:
        raise QuasarError(f"{file} cannot be read: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise QuasarError(f"{file} is not a whole safetensors file.") from error
    return entries


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, sorted: those of its index, else every one that lies there.

    A shard that the index names and the folder lacks is a QuasarError.
    """
    index = folder / INDEX_NAME
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        files = sorted({folder / name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise QuasarError(f"{index} is not a safetensors index.") from error
    for file in files:
        if not file.is_file():
            raise QuasarError(f"The model in {folder} is incomplete: its index names {file.name}, which is not there.")
    return files


def read_headers(folder: Path) -> list[TensorEntry]:
    """Every tensor of a model folder, sorted by name."""
    entries = [entry for file in weight_files(folder) for entry in read_header(file)]
    return sorted(entries, key=lambda entry: entry.name)


def _entry(name: str, stored: dict[str, Any], file: Path, base: int) -> TensorEntry:
    start, end = stored["data_offsets"]
    return TensorEntry(name, stored["dtype"], tuple(stored["shape"]), file, base + start, end - start)
