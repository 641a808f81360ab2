"""Let the system forget what it keeps of files that were read: it would push out what must stay in memory.

A control group's memory counts the pages of files that its processes read, as far as the system keeps them.
"""

import os
from pathlib import Path


def forget(descriptor: int, start: int = 0, count: int = 0) -> None:
    """Drop `count` bytes from `start` on from the page cache (0: up to the file's end); mapped pages stay.

    It is advice, which not every system takes.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, count, os.POSIX_FADV_DONTNEED)


def forget_file(path: Path, start: int = 0, count: int = 0) -> None:
    """Drop bytes of the file at `path`, as `forget` does. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        forget(descriptor, start, count)
    finally:
        os.close(descriptor)


def expect_random_reads(descriptor: int) -> None:
    """Tell the system that reads will be short and far apart, so that it reads nothing ahead; advice too."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
