"""Write a checkpoint whole or not at all: into a partial folder, then one rename."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from quasar_core.errors import QuasarError, UsageError

MAX_SHARD_BYTES = 4_000_000_000
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
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A safetensors file, whole or not at all."""
    partial = path.with_name(path.name + ".tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise QuasarError(f"{path} could not be written ({error}).") from error
    partial.replace(path)


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

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor; a full shard is written first."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_bytes:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += size
        self.total_bytes += size

    def _flush(self) -> None:
        save_tensors(self.folder / f"shard-{len(self._shards)}", self._pending)
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> None:
        """Write the last shard, give the shards their names, write the index."""
        if self._pending:
            self._flush()
        count = len(self._shards)
        weight_map = {}
        for i, names in enumerate(self._shards):
            shard = "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            (self.folder / f"shard-{i}").rename(self.folder / shard)
            weight_map.update(dict.fromkeys(names, shard))
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            write_json(self.folder / "model.safetensors.index.json", index)
