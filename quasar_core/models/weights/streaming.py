"""Stream the weights of blocks that memory does not hold: from the files into two buffers, block after block.

Every pass reads them once, in order. While one block computes, the next is read into the other buffer; behind the last
one the first two are read again, so that the next pass finds them there, whatever runs meanwhile. Each streamed block
has its place in one of the two buffers for good, so the weights' addresses do not change. Nothing of what was read
stays in the system's page cache: it would push out what stays in memory.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from quasar_core.checkpoint import float8_blocks
from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.errors import QuasarError
from quasar_core.kernels.cpu.compressed import CompressedWeight
from quasar_core.kernels.cpu.huge_pages import empty_in_huge_pages
from quasar_core.models.decoder.linear import Product
from quasar_core.models.weights.background import Background
from quasar_core.models.weights.compressed_files import CompressedCopy, Take
from quasar_core.models.weights.weight_reads import DTYPES, OpenFile, StoredWeight, read_weights, replaced
from quasar_core.records import Progress, no_progress
from quasar_core.store.safetensors_header import TensorEntry, read_header

BUFFERS = 2
ALIGNED = 64  # bytes: where a tensor begins in a buffer
Products = Mapping[int, Sequence[Product]]  # of some blocks, by their number


@dataclass
class _Buffer:
    """What a buffer holds, or will when `reading` has ended."""

    block: int | None = None
    reading: Future[None] | None = None


@dataclass
class LayerStream:
    """Implements `layer_source.LayerSource`; `weights` are the streamed blocks' by their numbers, of `count` in all.

    What fails in reading is raised by the pass that needs it, and the next pass tries again.
    """

    count: int
    weights: Mapping[int, Sequence[StoredWeight]]
    bytes_read: int = 0
    seconds_reading: float = 0.0
    seconds_waiting: float = 0.0  # of passes, for blocks that were not there yet
    spare: int = 0  # bytes of memory that are left beside all that is held
    _buffers: list[_Buffer] = field(default_factory=lambda: [_Buffer() for _ in range(BUFFERS)])

    def __post_init__(self) -> None:
        self._blocks = sorted(self.weights)
        self._ahead: list[Future[None] | None] = []  # readings that an earlier pass asked for
        self._reader = Background("quasar weights")  # one thread: a buffer has one writer

    @property
    def streamed(self) -> str | None:
        """How many blocks are fetched for every pass."""
        return f"{len(self._blocks)} of {self.count} blocks" if self.pass_bytes else None

    @property
    def pass_bytes(self) -> int:
        """Bytes that one pass reads."""
        if len(self._blocks) <= BUFFERS:
            return 0
        return sum(map(self._size, self._blocks))

    @property
    def staying_bytes(self) -> int:
        """Bytes of the blocks that stay in memory, taken to be as large as those that are streamed."""
        streamed = len(self._blocks)
        return self.pass_bytes * (self.count - streamed) // streamed if streamed else 0

    @property
    def bandwidth(self) -> float:
        """Bytes a second, of all that was read so far."""
        return self.bytes_read / self.seconds_reading if self.seconds_reading else 0.0

    @property
    def direct(self) -> bool:
        """Whether all reads pass by the system's page cache."""
        return all(weight.file.direct for weights in self.weights.values() for weight in weights)

    def start(self) -> None:
        """Read the first blocks, and wait for them."""
        for number in range(min(BUFFERS, len(self._blocks))):
            self._fetch(number)
        for number in range(min(BUFFERS, len(self._blocks))):
            self._await(number)

    def stretches(self) -> Iterator[range]:
        """All blocks in order; those that stay together, each streamed one alone while it is in its buffer."""
        begin, self._ahead = 0, [buffer.reading for buffer in self._buffers]
        for number, block in enumerate(self._blocks):
            if begin < block:
                yield range(begin, block)
            self._await(number)
            yield range(block, block + 1)
            self._fetch_after(number)
            begin = block + 1
        if begin < self.count:
            yield range(begin, self.count)

    def _await(self, number: int) -> None:
        """Wait for a block; what failed when an earlier pass had it read ahead is read once more."""
        buffer = self._buffers[number % BUFFERS]
        failed = buffer.reading is not None and buffer.reading in self._ahead and buffer.reading.exception() is not None
        if failed or buffer.block != self._blocks[number]:  # a pass was ended in its middle, or reading failed
            self._fetch(number)
        assert buffer.reading is not None
        start = time.perf_counter()
        try:
            buffer.reading.result()
            self.seconds_waiting += time.perf_counter() - start
        except QuasarError:
            buffer.block = None
            raise
        self._arrive(number)

    def _fetch(self, number: int) -> None:
        """Let a block be read into its buffer; until that is settled the buffer holds nothing that may be used."""
        buffer = self._buffers[number % BUFFERS]
        buffer.block = None
        buffer.reading = self._begin(number)
        buffer.block = self._blocks[number]

    def _fetch_after(self, number: int) -> None:
        """The next block of the same buffer; behind the last one the first."""
        following = number + BUFFERS
        following = following if following < len(self._blocks) else number % BUFFERS
        if following != number:
            self._fetch(following)

    def _begin(self, number: int) -> Future[None]:
        """Have a block brought to its buffer."""
        return self._reader.submit(self._read, self._blocks[number])

    def _arrive(self, number: int) -> None:
        """Let what computes wait for a block that was asked for; what was read is there."""

    def _size(self, block: int) -> int:
        """Bytes that a pass moves of a block."""
        return self._stored_size(block)

    def _stored_size(self, block: int) -> int:
        return sum(weight.entry.size for weight in self.weights[block])

    def _read(self, block: int) -> None:
        start = time.perf_counter()
        read_weights(self.weights[block])
        self.seconds_reading += time.perf_counter() - start
        self.bytes_read += self._stored_size(block)


class StreamedWeights:
    """Places in two buffers for the weights of some blocks' products, and where these are stored.

    `places` holds them by the names of a product, [out, in] in `dtype`, or in 12 bits where they come from a `copy`;
    then the products that are `kept` come from there too, each into a place of its own.
    """

    def __init__(
        self, files: TensorFiles, products: Products, dtype: torch.dtype, kept: Products, copy: CompressedCopy | None
    ) -> None:
        self.files, self.dtype, self._copy = files, dtype, copy
        self.places = dict[tuple[str, ...], torch.Tensor | CompressedWeight]()
        self._files = dict[Path, tuple[OpenFile, set[TensorEntry]]]()
        moved = [product for some in products.values() for product in some]
        moved += [product for some in kept.values() for product in some]
        self.names = {f"{name}.weight" for product in moved for name in product.names}
        for product in moved:
            for name, rows in zip(product.names, product.rows, strict=True):
                files.check_shape(f"{name}.weight", (rows, product.columns))  # before sizes that no memory has
        self._stored = self._place_blocks(products)
        self._kept = self._place([product for some in kept.values() for product in some], _own_room)

    def fill(self, name: str, place: torch.Tensor) -> None:
        """Bring a stored tensor that is not streamed to its place, and leave nothing of its file in memory."""
        if self.files.holds_whole(name) and self.files.entry(name).dtype in DTYPES:
            self._find(name, place).read()
        else:
            place.copy_(self.files.load(name))

    def stream(self, count: int) -> LayerStream:
        """The stream of a decoder with so many blocks."""
        return LayerStream(count, self._stored)

    def read_kept(self, progress: Progress = no_progress) -> None:
        """Bring the products that are kept, and come from a copy, to their places.

        All is loaded then; QuasarError where a file was replaced or changed meanwhile.
        """
        read_weights(self._kept)
        self.check_places()

    def check_places(self) -> None:
        """QuasarError where a file was replaced or changed since it was opened."""
        for file, _ in self._files.values():
            file.check_place()

    def _open(self, entry: TensorEntry) -> OpenFile:
        """An entry's file, held open; the tensor must lie in it where the header had it that was read before."""
        if entry.file not in self._files:
            file = OpenFile(entry.file)  # before the header is read: what replaces it later is told by its place
            self._files[entry.file] = file, {replace(one, name="") for one in read_header(entry.file)}
        file, held = self._files[entry.file]
        if replace(entry, name="") not in held:
            raise replaced(entry.file)
        return file

    def _place_blocks(self, products: Products) -> dict[int, list[StoredWeight]]:
        """Places of the streamed blocks' weights, in turn in two buffers, and what is read there."""
        size = max((buffer_bytes(some, self.dtype, self._copy) for some in products.values()), default=0)
        # Written to once: the first reading, which tells the bandwidth, would wait for the system to make their pages.
        buffers = [empty_in_huge_pages(size, dtype=torch.uint8).zero_() for _ in range(BUFFERS)]
        return {
            block: self._place(products[block], Room(buffers[number % BUFFERS]).take)
            for number, block in enumerate(sorted(products))
        }

    def _place(self, products: Sequence[Product], take: Take) -> list[StoredWeight]:
        """The weights of products, one behind the other in what room there is."""
        found = list[StoredWeight]()
        for product in products:
            if self._copy is not None:
                placed = self._copy.place(product, take, self._open)
                self.places[product.names] = placed.weight
                found += placed.stored
                continue
            self.places[product.names] = whole = self._whole(product, take)
            found += self._parts(product, whole)
        return found

    def _whole(self, product: Product, take: Take) -> torch.Tensor:
        """Room for a product's weight [out, in]."""
        return take(weight_bytes(product, self.dtype)).view(self.dtype).view(-1, product.columns)

    def _parts(self, product: Product, whole: torch.Tensor) -> Iterator[StoredWeight]:
        """The stored weights that make a product's, each at its rows."""
        for name, place in zip(product.names, whole.split(list(product.rows)), strict=True):
            yield self._find(f"{name}.weight", place)

    def _find(self, name: str, place: torch.Tensor) -> StoredWeight:
        """A stored weight, checked to be of the place's shape; QuasarError for a dtype that is not read."""
        entry, scales = self.files.entry(name), self.files.scales_of(name)
        if entry.dtype not in DTYPES or (entry.dtype == float8_blocks.STORED and scales is None):
            raise QuasarError(f"The tensor {name} in {self.files.folder} is {entry.dtype}, which cannot be streamed.")
        return StoredWeight(entry, self._open(entry), place, *(scales or ()))


class Room:
    """A buffer's bytes, handed out one part behind the other."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self._buffer, self._used = buffer, 0

    def take(self, size: int) -> torch.Tensor:
        """Take so many bytes of the room, from an aligned place on."""
        begin, self._used = self._used, self._used + _aligned(size)
        return self._buffer[begin : begin + size]


def _own_room(size: int) -> torch.Tensor:
    return empty_in_huge_pages(size, dtype=torch.uint8)


def weight_bytes(product: Product, dtype: torch.dtype) -> int:
    """Bytes of a product's weight in memory."""
    return sum(product.rows) * product.columns * dtype.itemsize


def buffer_bytes(products: Sequence[Product], dtype: torch.dtype, copy: CompressedCopy | None = None) -> int:
    """Bytes of the weights of products in a buffer, one behind the other, or as a copy holds them."""
    if copy is not None:
        return sum(_aligned(size) for product in products for size in copy.part_sizes(product))
    return sum(_aligned(weight_bytes(product, dtype)) for product in products)


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
