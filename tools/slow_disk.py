"""Let the reads of streamed weights pass no faster than a stated disk would give them."""

import os
import threading
import time
from collections.abc import Callable, Sequence


class SlowDisk:
    """Stands before `os.preadv`: a read ends no sooner than so many bytes a second allow, one after the other.

    Time in which nothing is read is not made up for, as with a disk. A disk that is slower by itself is left as it is.
    """

    def __init__(
        self,
        rate: float,
        read: Callable[[int, Sequence[memoryview], int], int] = os.preadv,
        now: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.rate, self._read, self._now, self._sleep = rate, read, now, sleep
        self._free_at = 0.0  # when the disk is done with what was asked so far
        self._one = threading.Lock()

    def __call__(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        """As `os.preadv`."""
        with self._one:
            begun = max(self._free_at, self._now())
            count = self._read(descriptor, buffers, offset)
            self._free_at = begun + count / self.rate
            left = self._free_at - self._now()
            if left > 0:
                self._sleep(left)
            return count


def slow_down(rate: float) -> None:
    """Let all reads of streamed weights of this process be so slow."""
    os.preadv = SlowDisk(rate)  # type: ignore[assignment]
