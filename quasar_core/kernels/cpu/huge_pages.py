"""Allocate memory for weights in huge pages where the system has them: fewer of a pass's reads wait for an address.

A huge page has 2 MB, so smaller weights lie beside one another in a common room of several. A room goes back to the
system with the last of its tensors.
"""

import contextlib
import math
import mmap
import threading

import torch

_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux alone knows it
_ROOM = 32 << 20  # bytes of a common room
_ALONE = _ROOM // 4  # bytes of a tensor that has its own pages
_SMALLEST = 16 << 10  # bytes for which it pays
_LINE = 64  # bytes of a cache line: a load across two takes twice


class _Common:
    """The common room that is being filled, and how far."""

    lock = threading.Lock()
    room: mmap.mmap | None = None
    used = _ROOM


def empty_in_huge_pages(*shape: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """An uninitialised tensor, on the CPU in huge pages. It is advice: a system that declines changes nothing else."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if _ADVICE is None or torch.device(device).type != "cpu" or size < _SMALLEST:
        return torch.empty(shape, dtype=dtype, device=device)
    room, begin = (new_room(size), 0) if size >= _ALONE else _place_in_common_room(size)
    with torch.inference_mode(False):  # a loaded weight is changed in either mode
        return torch.frombuffer(room, dtype=dtype, count=count, offset=begin).view(shape)


def _place_in_common_room(size: int) -> tuple[mmap.mmap, int]:
    with _Common.lock:
        begin = -(-_Common.used // _LINE) * _LINE
        if _Common.room is None or begin + size > _ROOM:
            _Common.room, begin = new_room(_ROOM), 0
        _Common.used = begin + size
        return _Common.room, begin


def new_room(size: int) -> mmap.mmap:
    """Memory of its own, in whole pages."""
    room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if _ADVICE is not None:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            room.madvise(_ADVICE)
    return room
