"""What a pass of T tokens costs, in seconds: measured once for a model, used to size drafts and windows."""

import itertools
import time
from dataclasses import dataclass

import numpy as np
import torch

from quasar_core.kernels.measure import clock
from quasar_core.models.base import CausalLM, KVCache
from quasar_core.models.pair import Pair

# The longest verify has 16 tokens and the longest confirm 33; kernels take 8 rows at a time, so that 9 cost more.
# In the order of measuring: a model so slow that the time is up within the first round has been timed at both ends.
SIZES = (1, 33, 4, 16, 2, 8, 9, 17)
SECONDS = 0.8
CONTEXT = 64
# The two best samples of a size lie this near to one another where nothing disturbed them.
REPEATABLE = 1.03


@dataclass(frozen=True)
class PassCost:
    """Seconds of a pass, at some sizes; between them linear, beyond the last along the last slope."""

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    def __call__(self, tokens: int) -> float:
        """Seconds of a pass of `tokens` tokens."""
        if tokens > self.sizes[-1] and len(self.sizes) > 1:
            slope = (self.seconds[-1] - self.seconds[-2]) / (self.sizes[-1] - self.sizes[-2])
            return self.seconds[-1] + max(slope, 0.0) * (tokens - self.sizes[-1])
        return float(np.interp(tokens, self.sizes, self.seconds))


@dataclass(frozen=True)
class PairCosts:
    """Costs of the verify pass and of the confirm pass; the same model's in a mode without a verifier."""

    verify: PassCost
    confirm: PassCost


def cost_from_samples(samples: dict[int, list[float]]) -> PassCost:
    """The cost behind timed passes of each size.

    Other work on the machine only ever adds to a time: the best sample is the nearest to the truth, and the time of a
    longer pass bounds that of a shorter one from above.
    """
    sizes = sorted(samples)
    best = np.array([min(samples[size]) for size in sizes])
    return PassCost(tuple(sizes), tuple(np.minimum.accumulate(best[::-1])[::-1].tolist()))


def measure_pass(pair: Pair, model: CausalLM, seconds: float = SECONDS) -> PassCost:
    """Time passes of each size, sizes interleaved, until their best times repeat or the time is up.

    A quiet machine needs a few rounds; a model of any size is timed at two sizes at least.
    """
    context = min(CONTEXT, pair.max_context // 2)
    sizes = [size for size in SIZES if context + size <= pair.max_context]
    cache = pair.new_cache(context + max(sizes))
    model.forward([0] * context, cache, last_only=True)
    if model.device.type == "cuda":  # the first pass of a size pays for its kernels and its graph
        for size in sizes:
            _time_pass(model, cache, size)
            cache.rollback(context)
    samples: dict[int, list[float]] = {}
    begin = time.perf_counter()
    for size in itertools.cycle(sizes):
        samples.setdefault(size, []).append(_time_pass(model, cache, size))
        cache.rollback(context)
        time_is_up = len(samples) >= min(2, len(sizes)) and time.perf_counter() - begin > seconds
        if time_is_up or (len(samples) == len(sizes) and all(map(_repeats, samples.values()))):
            break
    return cost_from_samples(samples)


def _repeats(samples: list[float]) -> bool:
    """Whether the best of at least three samples was no accident."""
    best = sorted(samples)
    return len(best) >= 3 and best[1] <= REPEATABLE * best[0]


def _time_pass(model: CausalLM, cache: KVCache, size: int) -> float:
    """Seconds until the logits of a pass can be read."""
    now = clock(model.device)
    start = now()
    model.forward([0] * size, cache)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return now() - start
