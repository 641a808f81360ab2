"""Control when glibc returns freed memory to the system (malloc_trim)."""

import ctypes
import functools
from collections.abc import Callable

import torch

FREED_BYTES = 32 * 2**20 - 2**16


def keep_freed_memory() -> None:
    """Let glibc keep the memory that tensors of a batch free, rather than ask the system for the same pages again.

    glibc gives freed memory back beyond a bound, which grows with the largest block freed so far, if below 32 MB.
    """
    torch.empty(FREED_BYTES, dtype=torch.uint8)  # never written to, so no memory is taken


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
