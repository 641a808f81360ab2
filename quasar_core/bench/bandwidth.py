"""How fast this machine reads memory: what every floor is computed from."""

import time

import torch

# Beyond what caches hold; a GPU needs more, or launching would be part of the time.
PROBE_BYTES = {"cpu": 512_000_000, "cuda": 4_000_000_000}
PROBE_REPEATS = 5


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second, the best of a few sums in all threads: no pass over weights in memory can be faster."""
    size = PROBE_BYTES[device.type]
    data = torch.ones(size // 4, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(PROBE_REPEATS):
        start = time.perf_counter()
        data.sum().item()
        best = min(best, time.perf_counter() - start)
    return size / best
