"""Allocate memory for weights in huge pages where the system has them: fewer of a pass's reads wait for an address."""

import ctypes
import mmap

import torch

_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux alone knows it
_SMALLEST = 4 << 20  # bytes for which it pays


def empty_in_huge_pages(*shape: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """An uninitialised tensor, on the CPU in huge pages. It is advice: a system that declines changes nothing else."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    size = tensor.numel() * tensor.element_size()
    if _ADVICE is not None and tensor.device.type == "cpu" and size >= _SMALLEST:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (tensor.data_ptr() + size - start) // mmap.PAGESIZE * mmap.PAGESIZE
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _ADVICE)
    return tensor


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
