"""What a stream of weights asks of a device: two queues of work beside one another, and main memory that it reads.

One queue computes, the other copies. Each does what it was asked for in order; an event, recorded in one, tells the
other, or the host, when that one has come so far. On CUDA a queue is a stream; elsewhere what is asked for is done at
once.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from quasar_core.errors import QuasarError
from quasar_core.kernels.cpu.huge_pages import empty_in_huge_pages
from quasar_core.kernels.gpu import on

Undo = Callable[[], None]


class Event(Protocol):
    """A place in a queue."""

    def synchronize(self) -> None:
        """Let the host wait until the queue has come so far."""
        ...


class Queue(Protocol):
    """Work that a device does in order. What is asked for here has not been done when the call returns."""

    def copy(self, place: torch.Tensor, source: torch.Tensor) -> None:
        """Copy `source`, in main memory, to its `place` on the device; neither may be written to until it is done."""
        ...

    def record(self) -> Event:
        """An event behind all that was asked for."""
        ...

    def wait(self, event: Any) -> None:
        """Do nothing more before another queue has come as far as its event."""
        ...


@dataclass(frozen=True)
class Link:
    """How weights come to a device.

    `pin` lets it read a part of main memory by itself, and returns what undoes that. Main memory holds the blocks
    `pinned`; others are read from their files for every pass.
    """

    computing: Queue
    copying: Queue
    pin: Callable[[torch.Tensor], Undo]
    pinned: frozenset[int]


def open_link(device: torch.device, pinned: frozenset[int]) -> Link:
    """The link of a device."""
    if device.type != "cuda":
        return Link(PlainQueue(), PlainQueue(), lambda memory: _nothing, pinned)
    return Link(CudaQueue(device), CudaQueue(device, torch.cuda.Stream(device)), _pinning(device), pinned)


class CudaQueue:
    """A stream of CUDA's; without one, whichever is current where work is asked for, as it is for passes."""

    def __init__(self, device: torch.device, stream: Any = None) -> None:
        self._device, self._own = device, stream

    @property
    def _stream(self) -> Any:
        return self._own or torch.cuda.current_stream(self._device)

    @torch.inference_mode()
    def copy(self, place: torch.Tensor, source: torch.Tensor) -> None:
        """See `Queue`. The place's memory is not given to others before the copy is done, whatever becomes of it."""
        with torch.cuda.stream(self._stream):
            place.copy_(source, non_blocking=True)
        place.record_stream(self._stream)

    def record(self) -> Event:
        """See `Queue`."""
        with on(self._device):
            event = torch.cuda.Event(blocking=True)
            event.record(self._stream)
        return event

    def wait(self, event: Any) -> None:
        """See `Queue`."""
        self._stream.wait_event(event)


class PlainQueue:
    """The queue of a device on which all is done when it is asked for."""

    @torch.inference_mode()
    def copy(self, place: torch.Tensor, source: torch.Tensor) -> None:
        """See `Queue`."""
        place.copy_(source)

    def record(self) -> Event:
        """See `Queue`."""
        return _Done()

    def wait(self, event: Any) -> None:
        """See `Queue`."""


class _Done:
    def synchronize(self) -> None:
        """It is done."""


class PinnedMemory:
    """Main memory that a device reads by itself, for as long as this object lives: [bytes] uint8.

    PyTorch's own allocator of such memory rounds sizes up to a power of two, so this is ordinary memory, registered.
    """

    def __init__(self, size: int, pin: Callable[[torch.Tensor], Undo]) -> None:
        self.bytes = empty_in_huge_pages(size, dtype=torch.uint8)
        weakref.finalize(self, pin(self.bytes)).atexit = False  # the system takes all back then


def _pinning(device: torch.device) -> Callable[[torch.Tensor], Undo]:
    """Pin memory by CUDA's runtime."""

    def pin(memory: torch.Tensor) -> Undo:
        address = memory.data_ptr()
        with on(device):
            refused = int(torch.cuda.cudart().cudaHostRegister(address, memory.nbytes, 0))
        if refused:
            raise QuasarError(
                f"{memory.nbytes / 1e9:.3g} GB of main memory cannot be pinned for {device} (CUDA's error {refused}): "
                "with less --max-memory more of the target is read from the disk."
            )

        def let_go() -> None:
            torch.cuda.synchronize(device)  # it may still be read
            torch.cuda.cudart().cudaHostUnregister(address)

        return let_go

    return pin


def _nothing() -> None:
    pass
