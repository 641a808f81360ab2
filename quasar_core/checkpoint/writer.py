"""Write a checkpoint whole or not at all: into a partial folder, then one rename."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from quasar_core.errors import QuasarError, UsageError

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
# What a model folder holds beside weights and config, and what a quantized copy of it keeps.
KEPT_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)


def refuse_existing(output: Path, force: bool) -> None:
    """An output that exists is replaced only with `--force`."""
    if output.exists() and not force:
        raise UsageError(f"{output} exists; pass --force to replace it, or --output for another place.")


def partial_folder(output: Path) -> Path:
    """Where the work in progress lies."""
    return output.with_name(output.name + ".partial")


def finish(partial: Path, output: Path) -> None:
    """Move the finished folder into place; an old one goes only after the new one stands."""
    old = output.with_name(output.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    partial.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Indented JSON, whole or not at all."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())  # the name must not be there before the content, also where the power fails
    partial.replace(path)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file, whole or not at all → its SHA-256 (hex); one tensor at a time passes through memory."""
    partial = path.with_name(path.name + ".tmp")
    # As safetensors writes them: wide elements first, so that every tensor is aligned; then by name.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    digest = hashlib.sha256()
    try:
        with partial.open("wb") as file:
            header = _header({name: tensors[name] for name in order}, {"format": "pt", **(metadata or {})})
            for content in chain([header], (_raw(tensors[name]) for name in order)):
                file.write(content)
                digest.update(content)
            file.flush()
            os.fsync(file.fileno())  # the name must not be there before the content
    except OSError as error:
        partial.unlink(missing_ok=True)
        why = error.strerror or error
        raise QuasarError(f"{path} could not be written ({why}); what is finished is kept.") from error
    partial.replace(path)
    return digest.hexdigest()


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
        if (source / name).exists():
            shutil.copyfile(source / name, destination / name)


class ShardWriter:
    """Collects tensors and writes them as shards of at most 4 GB with an index; one shard needs no index."""

    def __init__(self, folder: Path, max_bytes: int = MAX_SHARD_BYTES) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.total_bytes = 0
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._digests: list[str] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor; a full shard is written first."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_bytes:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += size
        self.total_bytes += size

    def _flush(self) -> None:
        self._digests.append(save_tensors(self.folder / f"shard-{len(self._shards)}", self._pending))
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> dict[str, str]:
        """Write the last shard, give the shards their names, write the index → SHA-256 (hex) of each file by name."""
        if self._pending:
            self._flush()
        count = len(self._shards)
        weight_map, digests = {}, {}
        for i, names in enumerate(self._shards):
            shard = "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            (self.folder / f"shard-{i}").rename(self.folder / shard)
            weight_map.update(dict.fromkeys(names, shard))
            digests[shard] = self._digests[i]
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            write_json(self.folder / "model.safetensors.index.json", index)
        return digests
