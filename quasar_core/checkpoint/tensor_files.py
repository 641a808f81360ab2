"""The safetensors files of a folder, read on demand and strictly."""

from collections.abc import Iterable, Iterator, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from quasar_core.checkpoint import float8_blocks, stacked_experts
from quasar_core.errors import QuasarError, foreign_errors
from quasar_core.files import is_file, require_regular
from quasar_core.malloc import return_freed_memory
from quasar_core.page_cache import forget_file
from quasar_core.store.model_config import read_config, text_entries
from quasar_core.store.safetensors_header import (
    INDEX_NAME,
    WEIGHTS_NAME,
    TensorEntry,
    read_headers,
    read_index,
    weight_files,
)
from quasar_core.store.text_part import prefixes_of, text_name


class TensorFiles:
    """The safetensors files of a folder as one mapping from name to tensor, read on demand.

    Of a multimodal model they are those of its text part, by the names of a text model (`store/text_part.py`); the
    names in the files are known too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sparing = False  # whether what was read is to leave memory at once
        files = weight_files(folder)
        if not files:
            raise QuasarError(f"{folder} holds no safetensors files.")
        for path in files:
            with open_tensors(path):
                pass  # the library's own checks of a header are stricter than ours
        text = text_entries(folder)
        self._stored = {name: entry.name for name, entry in text.items()}
        renamed = any(name != stored for name, stored in self._stored.items())
        self._prefixes = prefixes_of(self._stored.values()) if renamed else {}
        self._entries = {name: replace(entry, name=name) for name, entry in text.items()}
        self._where = {name: entry.file for name, entry in self._entries.items()}
        held = {entry.name: entry for entry in read_headers(folder)}
        beside = {name: held[name] for name in sorted(held.keys() - self._stored.values())}
        self._where |= {name: entry.file for name, entry in beside.items()}
        self._stored |= {name: name for name in beside}
        self._scales = self._take_scales(self._entries)
        self.dequantized = len(self._scales)  # weights that are stored in 8-bit floats and come as bfloat16
        self._scales |= self._take_scales(beside)
        self.beside = list(beside)  # what is not of the text, by its stored names
        self._entries, self._parts = stacked_experts.separate(self._entries)
        self._where |= {name: entry.file for name, entry in self._entries.items()}
        if files != [folder / WEIGHTS_NAME]:
            self._check_index(held.keys())

    def _take_scales(self, entries: dict[str, TensorEntry]) -> dict[str, Path]:
        """Where the scales of weights in 8-bit blocks lie, by the weight; they are no tensors of the model, and go."""
        coded = [name for name, entry in entries.items() if entry.dtype == float8_blocks.STORED]
        found = {name: self._where[scale] for name in coded if (scale := float8_blocks.scale_of(name)) in self._where}
        for name in found:
            module = name.removesuffix("weight")
            for extra in (float8_blocks.scale_of(name), *(f"{module}{end}" for end in float8_blocks.UNUSED)):
                entries.pop(extra, None)
        if found:
            self._block = float8_blocks.block_size(read_config(self.folder))
        return found

    def dequantizes(self, name: str) -> bool:
        """Whether a weight is one of those."""
        return self.own(name) in self._scales

    def _check_index(self, held: Set[str]) -> None:
        """A tensor that the index names and no file holds is lost; a verifier would be without it, unnoticed."""
        index = self.folder / INDEX_NAME
        named = read_index(self.folder) if is_file(index) else {}
        lost = sorted(named.keys() - held)
        if lost:
            raise QuasarError(f"{index} names the tensor {lost[0]}, and {named[lost[0]]} does not hold it.")

    def stored(self, name: str) -> str:
        """The name in the files of a tensor, or of a layer, that a text model has by this one."""
        prefix = next((own for own in self._prefixes if name.startswith(own) or f"{name}." == own), None)
        if name in self._stored or prefix is None:
            return self._stored.get(name, name)
        return (self._prefixes[prefix] + f"{name}.".removeprefix(prefix)).removesuffix(".")

    def own(self, stored: str) -> str:
        """The name that a text model has for a tensor of the files."""
        return (text_name(stored) if self._prefixes else None) or stored

    def __contains__(self, name: str) -> bool:
        return self.own(name) in self._entries

    def holds_whole(self, name: str) -> bool:
        """Whether a tensor is stored by itself, and not as a part of one with all experts."""
        return self.own(name) in self._entries and self.own(name) not in self._parts

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from its file's header."""
        return self.entry(name).shape

    def entry(self, name: str) -> TensorEntry:
        """Where a tensor's bytes lie."""
        if name not in self:
            raise QuasarError(f"{self.folder} holds no tensor {name}.")
        return self._entries[self.own(name)]

    def scales_of(self, name: str) -> tuple[torch.Tensor, tuple[int, int]] | None:
        """The scales of a weight in 8-bit floats, and the size of their blocks; None for other tensors."""
        if name not in self._scales:
            return None
        with open_tensors(self._scales[name]) as file:
            scales = self.stored(float8_blocks.scale_of(name))
            return read_tensor(file, scales, self._scales[name]), self._block

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """QuasarError where the stored tensor has another shape than the model's config gives it."""
        stored = self.shape(name)
        if stored != shape:
            raise QuasarError(f"The tensor {name} in {self.folder} is {stored}, and by its config {shape}.")

    def load(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        if self.own(name) not in self._where:
            raise QuasarError(f"{self.folder} holds no tensor {name}.")
        with open_tensors(self._where[self.own(name)]) as file:
            return self._read(file, self.own(name))

    def _read(self, file: Any, name: str) -> torch.Tensor:
        """One tensor of an open file, dequantized where it is stored in 8-bit blocks."""
        if name in self._parts:
            part = self._parts[name]
            with foreign_errors(f"The tensor {part.name} in {self._where[name]} cannot be read"):
                return part.read(file, self.stored(part.name))
        tensor = read_tensor(file, self.stored(name), self._where[name])
        scales = self.scales_of(name)
        return tensor if scales is None else float8_blocks.dequantize(name, tensor, *scales)

    def let_go(self, names: Iterable[str]) -> None:
        """Where memory is short: let the system have what reading tensors took that nobody holds any more.

        Raises OSError.
        """
        if not self.sparing:
            return
        for entry in [self._entries[name] for name in names]:
            forget_file(entry.file, entry.start, entry.size)
        return_freed_memory()

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same values."""
        return self.shape(one) == self.shape(other) and torch.equal(self.load(one), self.load(other))

    def load_many(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors file by file, each file opened once."""
        where = {name: self._where[self.own(name)] for name in names}
        for path in sorted(set(where.values())):
            with open_tensors(path) as file:
                for name in names:
                    if where[name] == path:
                        yield name, self._read(file, self.own(name))


def open_tensors(path: Path) -> Any:
    """A safetensors file, memory-mapped on the CPU."""
    require_regular(path)
    with foreign_errors(f"{path} is not a readable safetensors file"):
        return safe_open(path, framework="pt", device="cpu")


def read_tensor(file: Any, name: str, path: Path) -> torch.Tensor:
    """One tensor of an open file; `path` is where it lies, for the sentence of a failure."""
    with foreign_errors(f"The tensor {name} in {path} cannot be read"):
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor
