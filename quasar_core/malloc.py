"""Control when glibc returns freed memory to the system (malloc_trim)."""

import contextlib
import ctypes
import functools
from collections.abc import Callable

FREED_BYTES = 32 * 2**20 - 2**16
KEPT_BYTES = 256 * 2**20  # more than what the passes over a batch, or over some rows of logits, make and free
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt


def keep_freed_memory() -> None:
    """Let glibc keep the memory that tensors of a batch free, rather than ask the system for the same pages again.

    Otherwise it gives back what lies free at the end of its heap beyond a bound, and gets every larger block by itself.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, FREED_BYTES)
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES)


def return_freed_memory() -> None:
    """Return freed memory to the system: small tensors between large ones would make the heap grow with time."""
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """Find glibc's `malloc_trim`; None with another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
