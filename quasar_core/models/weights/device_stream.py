"""Stream the blocks that a device's memory does not hold: from main memory, or from files, into two buffers there.

The order is that of `streaming.py`: two buffers, each block always in the same one; behind the last block the first two
are fetched again. Here a fetch asks for a copy, and nobody waits for it but the device: the copy, for what was computed
on the buffer before; what is computed next, for the copy. Blocks that main memory does not hold either are read from
their files into pinned memory on the way, by a thread, for which the host waits.
"""

import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.models.weights.device_queues import Event, Link, PinnedMemory
from quasar_core.models.weights.streaming import BUFFERS, LayerStream, Products, Room, StreamedWeights, buffer_bytes
from quasar_core.models.weights.weight_reads import StoredWeight, read_weights
from quasar_core.records import Progress, no_progress

TIMED_COPIES = 3  # of a block, of which the fastest tells the link's bandwidth


@dataclass(kw_only=True)
class DeviceStream(LayerStream):
    """Implements `layer_source.LayerSource`: `rooms` in main memory are copied to `buffers` on the device.

    Rooms of blocks that are read for every pass are shared by several of them.
    """

    link: Link
    rooms: Mapping[int, torch.Tensor]  # by block, [bytes] uint8
    buffers: list[torch.Tensor]  # [bytes] uint8
    memory: PinnedMemory  # in which the rooms lie
    link_rate: float = 0.0  # bytes a second, once that was measured

    def __post_init__(self) -> None:
        super().__post_init__()
        self._copied: list[Event | None] = [None] * BUFFERS
        self._left = dict[int, Event]()  # by a shared room's address: when its last block had been copied from there
        self._bytes_stored = 0  # of files, read in `seconds_reading`

    @property
    def streamed(self) -> str | None:
        """How many blocks are fetched for every pass, and how many of them from files."""
        read = len(self._read_blocks)
        return f"{super().streamed}, {read} from the disk" if super().streamed and read else super().streamed

    @property
    def _read_blocks(self) -> list[int]:
        return [block for block in self._blocks if block not in self.link.pinned]

    @property
    def read_bytes(self) -> int:
        """Bytes of files that one pass reads."""
        return sum(map(self._stored_size, self._read_blocks)) if self.pass_bytes else 0

    @property
    def bandwidth(self) -> float:
        """Bytes a second of a pass: of the link, or of the disk where that takes longer; both go on side by side."""
        if not self.link_rate or not self.pass_bytes:
            return self.link_rate
        seconds = self.pass_bytes / self.link_rate
        if self.seconds_reading:
            seconds = max(seconds, self.read_bytes * self.seconds_reading / self._bytes_stored)
        return self.pass_bytes / seconds

    def start(self) -> None:
        """Fetch the first blocks, read what tells the disk's speed, and time the link."""
        super().start()
        room, copying = self.rooms[self._blocks[0]], self.link.copying
        copying.record().synchronize()
        times = []
        for _ in range(TIMED_COPIES):  # what lies in the first buffer, once more
            start = time.perf_counter()
            copying.copy(self.buffers[0][: len(room)], room)
            copying.record().synchronize()
            times.append(time.perf_counter() - start)
        self.link_rate = room.nbytes / min(times)
        if self._read_blocks and not self.seconds_reading:
            self._read_into_room(self._read_blocks[0])

    def _begin(self, number: int) -> Future[None]:
        """Whatever was asked of the device so far may read the buffer; so it does where a pass was interrupted."""
        return self._reader.submit(self._fetch_into_buffer, number, self.link.computing.record())

    def _arrive(self, number: int) -> None:
        copied = self._copied[number % BUFFERS]
        assert copied is not None
        self.link.computing.wait(copied)

    def _size(self, block: int) -> int:
        return self.rooms[block].nbytes

    def _fetch_into_buffer(self, number: int, free: Event) -> None:
        """Ask for a block's copy, once its weights are in main memory; `free` is when its buffer is."""
        block = self._blocks[number]
        room, copying = self.rooms[block], self.link.copying
        is_read = block not in self.link.pinned
        if is_read:
            self._read_into_room(block)
        copying.wait(free)
        copying.copy(self.buffers[number % BUFFERS][: len(room)], room)
        self._copied[number % BUFFERS] = copied = copying.record()
        if is_read:
            self._left[room.data_ptr()] = copied
        self.bytes_read += room.nbytes

    def _read_into_room(self, block: int) -> None:
        """Read a block from its files, when the one before it has left the room."""
        left = self._left.get(self.rooms[block].data_ptr())
        if left is not None:
            left.synchronize()
        start = time.perf_counter()
        read_weights(self.weights[block])
        self.seconds_reading += time.perf_counter() - start
        self._bytes_stored += self._stored_size(block)


class DeviceWeights(StreamedWeights):
    """`StreamedWeights` for a device: places in two buffers there, and rooms in pinned memory of the same layout."""

    def __init__(
        self, files: TensorFiles, products: Products, dtype: torch.dtype, device: torch.device, link: Link
    ) -> None:
        self._device, self._link = device, link
        super().__init__(files, products, dtype, {}, None)

    def stream(self, count: int) -> LayerStream:
        """See `StreamedWeights`."""
        return DeviceStream(
            count, self._stored, link=self._link, rooms=self._rooms, buffers=self._buffers, memory=self._memory
        )

    def read_kept(self, progress: Progress = no_progress) -> None:
        """Bring the blocks that main memory holds there; raises as that of `StreamedWeights`."""
        pinned = sorted(self._link.pinned & self._stored.keys())
        for done, block in enumerate(pinned):
            progress("reading streamed blocks", done, len(pinned))
            read_weights(self._stored[block])
        progress("reading streamed blocks", len(pinned), len(pinned))
        self.check_places()

    def _place_blocks(self, products: Products) -> dict[int, list[StoredWeight]]:
        sizes = {block: buffer_bytes(products[block], self.dtype) for block in sorted(products)}
        largest = max(sizes.values())
        self._buffers = [torch.empty(largest, dtype=torch.uint8, device=self._device) for _ in range(BUFFERS)]
        self._rooms = self._make_rooms(sizes)
        stored = dict[int, list[StoredWeight]]()
        for number, block in enumerate(sizes):
            place, room = Room(self._buffers[number % BUFFERS]), Room(self._rooms[block])
            stored[block] = []
            for product in products[block]:
                self.places[product.names] = self._whole(product, place.take)
                stored[block] += self._parts(product, self._whole(product, room.take))
        return stored

    def _make_rooms(self, sizes: Mapping[int, int]) -> dict[int, torch.Tensor]:
        """One for each block that is held; the others take turns in two."""
        held = [block for block in sizes if block in self._link.pinned]
        read = [block for block in sizes if block not in self._link.pinned]
        shared = max((sizes[block] for block in read), default=0)
        self._memory = PinnedMemory(memory_bytes(sizes, held), self._link.pin)
        memory = Room(self._memory.bytes)
        rooms = {block: memory.take(sizes[block]) for block in held}
        in_turn = [memory.take(shared) for _ in range(BUFFERS)]
        return rooms | {block: in_turn[turn % BUFFERS][: sizes[block]] for turn, block in enumerate(read)}


def memory_bytes(sizes: Mapping[int, int], held: list[int]) -> int:
    """Main memory for blocks of these sizes, of which some are held and the others read in turn."""
    shared = max((size for block, size in sizes.items() if block not in held), default=0)
    return sum(sizes[block] for block in held) + BUFFERS * shared
