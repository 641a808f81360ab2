"""Write a checkpoint's files: tensors, shards and their index, JSON; each whole or not at all."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quasar_core.errors import WriteError, foreign_errors
from quasar_core.files import is_file, sync, write_json, written_whole
from quasar_core.store.folders import KEPT_FILES
from quasar_core.store.safetensors_header import read_header

MAX_SHARD_BYTES = 4_000_000_000
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file, whole or not at all → its SHA-256 (hex); one tensor at a time passes through memory."""
    digest = hashlib.sha256()
    try:
        with written_whole(path) as beside, beside.open("wb") as file:
            for content in pieces_of(tensors, metadata):
                file.write(content)
                digest.update(content)
    except OSError as error:
        why = error.strerror or error
        raise WriteError(f"{path} could not be written ({why}).") from error
    return digest.hexdigest()


def pieces_of(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[Any]:
    """The bytes of a safetensors file: its header, then one tensor after the other."""
    # As safetensors writes them: wide elements first, so that every tensor is aligned; then by name.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    yield _header({name: tensors[name] for name in order}, {"format": "pt", **(metadata or {})})
    for name in order:
        yield _raw(tensors[name])


def _raw(tensor: torch.Tensor) -> Any:
    """A tensor's bytes, without a copy where it lies on the CPU in one piece."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _header(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON of a safetensors file's header, padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def copy_kept_files(source: Path, destination: Path) -> None:
    """Copy tokenizer, chat template and generation config."""
    for name in KEPT_FILES:
        if is_file(source / name):
            with foreign_errors(f"{source / name} could not be copied"):
                shutil.copyfile(source / name, destination / name)
                sync(destination / name)


def link_or_copy(file: Path, name: Path) -> None:
    """Give a file a second name; it is copied where the file system has no hard links (FAT, some network folders)."""
    try:
        os.link(file, name)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV):
            raise
        shutil.copyfile(file, name)
        sync(name)


@dataclass(frozen=True)
class _Shard:
    """A finished shard: its file under another name, which it `keeps` or gives up for the final one."""

    file: Path
    names: list[str]
    digest: str
    keeps: bool = False


class ShardWriter:
    """Collects tensors and writes them as shards of at most 4 GB with an index; one shard needs no index."""

    def __init__(self, folder: Path, max_bytes: int = MAX_SHARD_BYTES) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.total_bytes = 0
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[_Shard] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor; a full shard is written first."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_bytes:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += size
        self.total_bytes += size

    def add_file(self, file: Path, digest: str) -> None:
        """Add a finished safetensors file of this SHA-256 (hex) as a shard of its own, which is not written again."""
        entries = read_header(file)
        self._shards.append(_Shard(file, [entry.name for entry in entries], digest, keeps=True))
        self.total_bytes += sum(entry.size for entry in entries)

    def _flush(self) -> None:
        file = self.folder / f"shard-{len(self._shards)}"
        digest = save_tensors(file, self._pending)
        self._shards.append(_Shard(file, list(self._pending), digest))
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> dict[str, str]:
        """Write the last shard, give the shards their names, write the index → SHA-256 (hex) of each file by name."""
        if self._pending:
            self._flush()
        count = len(self._shards)
        weight_map, digests = {}, {}
        for i, shard in enumerate(self._shards):
            name = "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            if shard.keeps:
                link_or_copy(shard.file, self.folder / name)
            else:
                shard.file.rename(self.folder / name)
            weight_map.update(dict.fromkeys(shard.names, name))
            digests[name] = shard.digest
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            write_json(self.folder / "model.safetensors.index.json", index)
        return digests
