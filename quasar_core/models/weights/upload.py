"""Copy tensors from memory-mapped files to a GPU, as fast as the disk gives them.

A copy from ordinary memory passes through a small buffer of the driver's, one piece after the other. Here several
threads read pieces into pinned buffers, from where the GPU fetches them while the next ones are read.
"""

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

THREADS = 6
PIECE_BYTES = 32 << 20
MOST_WAITING = 4 * THREADS  # pieces; their tensors are held meanwhile


class Upload:
    """Copies tensors to their places on a device; on leaving the context everything is there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._threads = ThreadPoolExecutor(THREADS if device.type == "cuda" else 1)
        self._waiting: deque[Future[None]] = deque()
        self._own = threading.local()  # each thread's buffer, stream, and the event of its last copy

    def __enter__(self) -> "Upload":
        """Wait for what may still use the places' memory, which was another tensor's; threads start as needed."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the copies; what failed in a thread is raised here."""
        try:
            while self._waiting and kind is None:
                self._waiting.popleft().result()
        finally:
            self._threads.shutdown(wait=True, cancel_futures=True)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

    def copy(self, place: torch.Tensor, stored: torch.Tensor) -> None:
        """Copy a stored tensor to its place, of another dtype perhaps; shapes that differ are broadcast at once."""
        as_they_lie = place.is_contiguous() and stored.is_contiguous()
        if place.shape != stored.shape or stored.device.type != "cpu" or not as_they_lie:
            place.copy_(stored)
            return
        piece = max(PIECE_BYTES // stored.itemsize, 1)
        for target, source in zip(place.view(-1).split(piece), stored.view(-1).split(piece), strict=True):
            self._waiting.append(self._threads.submit(self._copy_piece, target, source))
            if len(self._waiting) > MOST_WAITING:
                self._waiting.popleft().result()

    @torch.inference_mode()
    def _copy_piece(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if self.device.type != "cuda":
            target.copy_(source)
            return
        if not hasattr(self._own, "buffer"):
            self._own.buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
            self._own.stream, self._own.copied = torch.cuda.Stream(self.device), torch.cuda.Event()
        self._own.copied.synchronize()
        pinned = self._own.buffer[: source.nbytes].view(source.dtype)
        pinned.copy_(source)
        with torch.cuda.stream(self._own.stream):
            target.copy_(pinned.to(self.device, non_blocking=True))
            self._own.copied.record()
