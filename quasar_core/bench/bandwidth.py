"""How fast this machine reads memory: what every floor is computed from."""

import torch

from quasar_core.timing import time_one, timed

# Beyond what caches hold; a GPU needs more, or launching would be part of the time.
PROBE_BYTES = {"cpu": 512_000_000, "cuda": 4_000_000_000}
PROBE_REPEATS = 5


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second, the best of a few sums in all threads: no pass over weights in memory can be faster."""
    size = PROBE_BYTES[device.type]
    data = torch.ones(size // 4, dtype=torch.float32, device=device)
    return size / time_one(timed(lambda: data.sum().item()), rounds=PROBE_REPEATS).samples[0]
