"""Memory that tensors have left: kept by the C library where that is faster, returned where it would add up."""

import ctypes
import functools
from collections.abc import Callable

import torch

FREED_BYTES = 32 * 2**20 - 2**16


def keep_freed_memory() -> None:
    """Let the C library keep what tensors of a batch leave, rather than ask the system for the same pages every time.

    glibc gives freed memory back beyond a bound, which grows with the largest block freed so far, if below 32 MB.
    """
    torch.empty(FREED_BYTES, dtype=torch.uint8)  # never written to, so no memory is taken


def return_freed_memory() -> None:
    """Give all that is kept back to the system: small tensors among large ones would make it grow with time."""
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`, or None with another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
