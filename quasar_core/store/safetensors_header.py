"""Read what a safetensors file holds from its header alone: no weights, no torch."""

import functools
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quasar_core.errors import QuasarError, reason
from quasar_core.files import is_file, opened, parse_json, read_json
from quasar_core.typed import build

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
_MAX_FILE_BYTES = 1 << 50
WEIGHTS_NAME = "model.safetensors"
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
    with opened(file, _MAX_FILE_BYTES) as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        text = stream.read(length) if 2 <= length <= _MAX_HEADER_BYTES else b""
        size = stream.seek(0, os.SEEK_END)
    return list(_parse_header(file, length, text, size))


@functools.lru_cache(maxsize=64)  # a model's files are asked for several times while it is loaded
def _parse_header(file: Path, length: int, text: bytes, size: int) -> tuple[TensorEntry, ...]:
    """The tensors of a file of so many bytes, by its header's text."""
    try:
        header = build(dict[str, Any], parse_json(text.decode("utf-8")))
        build(dict[str, str], header.pop("__metadata__", None) or {}, "__metadata__")
        base = _LENGTH_BYTES + length
        entries = [_entry(build(_Stored, stored, name), name, file, base) for name, stored in header.items()]
        if max((entry.start + entry.size for entry in entries), default=base) > size:
            raise ValueError("it is cut short")
    except ValueError as error:
        raise QuasarError(f"{file} is not a whole safetensors file ({reason(error)}).") from error
    return tuple(entries)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, sorted, as transformers chooses them.

    `model.safetensors` alone where there is one, else those of the index, else every one that lies there (older GPTQ
    checkpoints have names of their own). A shard that the index names and the folder lacks is a QuasarError.
    """
    indexed, whole = _indexed_files(folder), folder / WEIGHTS_NAME
    if is_file(whole):
        return [whole]
    return indexed or sorted(folder.glob("*.safetensors"))


def weight_bytes(folder: Path) -> int:
    """Bytes of a model folder's safetensors files."""
    return sum(path.stat().st_size for path in weight_files(folder))


def _indexed_files(folder: Path) -> list[Path]:
    """The files that the folder's index names; none without an index."""
    index = folder / INDEX_NAME
    if not is_file(index):
        return []
    files = sorted({folder / name for name in read_index(folder).values()})
    for file in files:
        if not is_file(file):
            raise QuasarError(f"The model in {folder} is incomplete: its index names {file.name}, which is not there.")
    return files


def read_headers(folder: Path) -> list[TensorEntry]:
    """Every tensor of a model folder, sorted by name; QuasarError where two files hold one of the same name."""
    entries: dict[str, TensorEntry] = {}
    for file in weight_files(folder):
        for entry in read_header(file):
            other = entries.setdefault(entry.name, entry)
            if other is not entry:
                raise QuasarError(
                    f"The tensor {entry.name} is in both {other.file.name} and {file.name} of {folder}: remove the "
                    "file that does not belong to the model."
                )
    return [entries[name] for name in sorted(entries)]


def read_index(folder: Path) -> dict[str, str]:
    """The file of each tensor, by the folder's index; QuasarError for one that names a file elsewhere."""
    index = folder / INDEX_NAME
    try:
        files = build(dict[str, str], read_json(index).get("weight_map"), "weight_map")
        for name in files.values():
            if Path(name).name != name:
                raise ValueError(f"{name!r} is not the name of a file")
    except ValueError as error:
        raise QuasarError(f"{index} is not a safetensors index ({error}).") from error
    return files


@dataclass(frozen=True)
class _Stored:
    """A tensor as the header describes it."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


def _entry(stored: _Stored, name: str, file: Path, base: int) -> TensorEntry:
    if len(stored.data_offsets) != 2 or not 0 <= stored.data_offsets[0] <= stored.data_offsets[1]:
        raise ValueError(f"{name} has the offsets {stored.data_offsets}")
    start, end = stored.data_offsets
    elements, bits = math.prod(stored.shape), 8 * (end - start)
    if min(stored.shape, default=1) < 0 or bool(elements) != bool(bits) or (elements and bits % elements):
        raise ValueError(f"{name} has the shape {stored.shape} in {end - start} bytes")
    return TensorEntry(name, stored.dtype, tuple(stored.shape), file, base + start, end - start)
