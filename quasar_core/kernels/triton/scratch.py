"""Scratch memory on the device: reserved once, never moved, so that CUDA graphs may point to it."""

from dataclasses import dataclass
from functools import cache

import torch

PARTIAL_FLOATS = 4 * 1024 * 1024  # 16 MiB: partial products of one call
_COUNTERS = 16384


@dataclass(frozen=True)
class Scratch:
    """Shared by all calls on a device, which are therefore on one stream at a time."""

    partials: torch.Tensor  # float32
    counters: torch.Tensor  # int32; zero between calls

    def fits(self, splits: int, rows: int, blocks: int) -> bool:
        """Whether `splits` partial products of `rows` values in `blocks` blocks have room."""
        return splits * rows <= self.partials.numel() and blocks <= self.counters.numel()


@cache
def scratch(device: torch.device) -> Scratch:
    """The device's scratch; the first call, which must not be inside of a graph's capture, reserves it."""
    partials = torch.empty(PARTIAL_FLOATS, dtype=torch.float32, device=device)
    return Scratch(partials, torch.zeros(_COUNTERS, dtype=torch.int32, device=device))
