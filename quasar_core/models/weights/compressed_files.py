"""Keep a target's blocks in 12 bits on the disk, for targets that are streamed: a quarter fewer bytes are read a sweep.

The copy lies in quasar's own folder, by the model's fingerprint and by when its files were written. A file for each
block is whole or not at all: what was interrupted goes on with the next block. Nothing is lost in it
(`kernels/cpu/compressed.py`), and passes in C++ read weights so as they lie in a buffer.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.checkpoint.writer import save_tensors
from quasar_core.errors import QuasarError
from quasar_core.files import is_file
from quasar_core.kernels.cpu.compressed import BITS, CompressedWeight, parts_fit
from quasar_core.kernels.cpu.library import why_not_here
from quasar_core.malloc import return_freed_memory
from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.decoder.linear import Product, block_products
from quasar_core.models.weights.weight_reads import OpenFile, StoredWeight, read_weights
from quasar_core.page_cache import forget_file
from quasar_core.records import Progress, no_progress
from quasar_core.store.fingerprint import fingerprint
from quasar_core.store.folders import home
from quasar_core.store.model_config import read_text_config
from quasar_core.store.safetensors_header import TensorEntry, read_header, weight_files
from quasar_core.system import free_disk, refuse_too_little

COPIES = "compressed"
PARTS = {"strips": torch.uint8, "bases": torch.uint8, "first": torch.int32, "outliers": torch.uint8}
SHARE = BITS / 16 + 0.01  # of the bytes as they were: scales of strips, and outliers
STEP = 16  # inputs that are read at once

Take = Callable[[int], torch.Tensor]  # so many bytes of room, as uint8
Opened = Callable[[TensorEntry], OpenFile]  # the file of an entry


@dataclass(frozen=True)
class CompressedCopy:
    """Where each part of each product's weight lies."""

    entries: Mapping[str, TensorEntry]

    def part_sizes(self, product: Product) -> list[int]:
        """Bytes of a product's parts."""
        return [entry.size for _, entry in self.parts(product)]

    def place(self, product: Product, take: Take, opened: Opened) -> "PlacedWeight":
        """A product's weight, whose parts are to be read into room that `take` gives."""
        places, stored = dict[str, torch.Tensor](), list[StoredWeight]()
        for part, entry in self.parts(product):
            places[part] = take(entry.size).view(PARTS[part]).view(entry.shape)
            stored.append(StoredWeight(entry, opened(entry), places[part]))
        return PlacedWeight(CompressedWeight.at(sum(product.rows), product.columns, **places), stored)

    def parts(self, product: Product) -> Iterator[tuple[str, TensorEntry]]:
        """Where a product's parts lie, by their names."""
        for part in PARTS:
            yield part, self.entries[f"{product.names[0]}.{part}"]


@dataclass(frozen=True)
class PlacedWeight:
    """A compressed weight that waits for its content, and where that is stored."""

    weight: CompressedWeight
    stored: list[StoredWeight]


def why_not_copied(folder: Path, dtype: torch.dtype) -> str | None:
    """Why a model's blocks are not kept in 12 bits, or None where they can be."""
    if dtype != torch.bfloat16:
        return f"only bfloat16 is compressed, and weights are computed in {str(dtype).removeprefix('torch.')}"
    if TensorFiles(folder).dequantized:
        return "its weights are stored in 8 bits"
    if any(product.columns % STEP for products in _blocks(folder) for product in products):
        return f"the inputs of a layer are not a multiple of {STEP}"
    return why_not_here()


def find_copy(folder: Path) -> CompressedCopy | None:
    """The copy of a model, where it is whole and of this version."""
    place, entries = place_of(folder), dict[str, TensorEntry]()
    blocks = _blocks(folder)
    for number, products in enumerate(blocks):
        found = _read_block(place / block_name(number), products)
        if found is None:
            return None
        entries |= found
    copy = CompressedCopy(entries)
    return copy if _is_current(copy, folder, blocks[0]) else None


def make_copy(folder: Path, progress: Progress = no_progress) -> CompressedCopy:
    """The copy of a model, written where it is not there. QuasarError where the disk has no room for it."""
    found = find_copy(folder)
    if found is not None:
        return found
    place, blocks, files = place_of(folder), _blocks(folder), TensorFiles(folder)
    begun = _read_block(place / block_name(0), blocks[0])
    if begun is not None and not _is_current(CompressedCopy(begun), folder, blocks[0]):
        shutil.rmtree(place)  # an earlier version's
    left = [n for n, products in enumerate(blocks) if _read_block(place / block_name(n), products) is None]
    needed = sum(expected_bytes(product) for block in left for product in blocks[block])
    _require_room(place, needed)
    stage = f"writing a copy in {BITS} bits, {needed / 1e9:.3g} GB"
    for block in left:
        progress(stage, block, len(blocks))
        _write_block(files, blocks[block], place / block_name(block))
    progress(stage, len(blocks), len(blocks))
    copy = find_copy(folder)
    assert copy is not None
    return copy


def forget_copies() -> int:
    """Remove the copies of all models; how many there were."""
    copies = [path for path in (home() / COPIES).glob("*") if path.is_dir()]
    for path in copies:
        shutil.rmtree(path)
    return len(copies)


def place_of(folder: Path) -> Path:
    """Where a model's copy lies; a fingerprint knows samples alone, so files that were written anew have another."""
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weight_files(folder)]
    written = hashlib.sha256(json.dumps(states).encode()).hexdigest()
    return home() / COPIES / f"{fingerprint(folder)[:32]}-{written[:16]}"


def block_name(block: int) -> str:
    """The name of a block's file."""
    return f"block-{block:05d}.safetensors"


def expected_bytes(product: Product) -> int:
    """About what a product takes in a copy."""
    return int(2 * sum(product.rows) * product.columns * SHARE)


def _blocks(folder: Path) -> list[list[Product]]:
    """The products of each block."""
    config = DecoderConfig.parse(read_text_config(folder))
    return [list(block_products(config, block).values()) for block in range(config.num_layers)]


def _write_block(files: TensorFiles, products: list[Product], path: Path) -> None:
    parts = dict[str, torch.Tensor]()
    for product in products:
        weight = CompressedWeight.of(_weight_of(files, product))
        parts |= {f"{product.names[0]}.{part}": getattr(weight, part) for part in PARTS}
        for name in product.names:
            entry = files.entry(f"{name}.weight")
            forget_file(entry.file, entry.start, entry.size)
    save_tensors(path, parts)
    return_freed_memory()


def _weight_of(files: TensorFiles, product: Product) -> torch.Tensor:
    """A product's weight [out, in] as it is computed with."""
    return torch.cat([files.load(f"{name}.weight").to(torch.bfloat16) for name in product.names])


def _read_block(path: Path, products: list[Product]) -> dict[str, TensorEntry] | None:
    """Where the parts of a block's products lie; None where the file is not there, or not what it should be."""
    if not is_file(path):
        return None
    try:
        copy = CompressedCopy({entry.name: entry for entry in read_header(path)})
        opened = OpenFile(path)
        whole = all(_is_whole(dict(copy.parts(product)), product, opened) for product in products)
    except (KeyError, QuasarError):  # a part is missing, or no header is to be read
        return None
    return dict(copy.entries) if whole else None


def _is_whole(parts: Mapping[str, TensorEntry], product: Product, opened: OpenFile) -> bool:
    """Whether a product's parts have the sizes that they must have."""
    dtype = PARTS["first"]
    first = torch.empty(parts["first"].size // dtype.itemsize, dtype=dtype)
    if parts["first"].shape != first.shape or not len(first):
        return False
    StoredWeight(parts["first"], opened, first).read()
    return parts_fit(sum(product.rows), product.columns, tuple(part.size for part in parts.values()), first)


def _is_current(copy: CompressedCopy, folder: Path, products: list[Product]) -> bool:
    """Whether a copy has the format of this version: the smallest of these products is the model's."""
    product = min(products, key=lambda product: sum(product.rows) * product.columns)
    placed = copy.place(product, lambda size: torch.empty(size, dtype=torch.uint8), lambda entry: OpenFile(entry.file))
    read_weights(placed.stored)
    return torch.equal(placed.weight.restore(), _weight_of(TensorFiles(folder), product))


def _require_room(place: Path, needed: int) -> None:
    remedy = f"leave it out, free some in {place.parent}, or set QUASAR_HOME to a larger disk"
    refuse_too_little("of disk", needed, free_disk(place), remedy, "--compress")
