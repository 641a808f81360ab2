"""What a pass of T tokens costs, in seconds: measured once for a loaded pair, used to size drafts and windows."""

import time
from dataclasses import dataclass

import numpy as np
import torch

from quasar_core.models.base import CausalLM
from quasar_core.models.pair import Pair

SIZES = (1, 2, 4, 8, 16)
SECONDS = 1.0
CONTEXT = 64


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


def measure_pass(pair: Pair, model: CausalLM, seconds: float = SECONDS) -> PassCost:
    """Best of a few passes at each size, sizes interleaved; the first round warms up, and big models get fewer rounds."""
    context = min(CONTEXT, pair.max_context // 2)
    sizes = tuple(size for size in SIZES if context + size <= pair.max_context)
    cache = pair.new_cache(context + sizes[-1])
    model.forward([0] * context, cache, last_only=True)
    best = dict.fromkeys(sizes, float("inf"))
    begin = time.perf_counter()
    for round_number in range(8):
        for size in sizes:
            start = time.perf_counter()
            model.forward([0] * size, cache)
            _wait_for(pair.device)
            taken = time.perf_counter() - start
            if round_number > 0 or time.perf_counter() - begin > seconds:
                best[size] = min(best[size], taken)
            cache.rollback(context)
        if round_number > 0 and time.perf_counter() - begin > seconds:
            break
    return PassCost(sizes, tuple(np.maximum.accumulate([best[size] for size in sizes]).tolist()))


def measure_costs(pair: Pair, with_verifier: bool) -> PairCosts:
    """The costs that a mode needs."""
    verify = measure_pass(pair, pair.verifier if with_verifier and pair.verifier else pair.primary)
    if not with_verifier or pair.target is None:
        return PairCosts(verify, verify)
    return PairCosts(verify, measure_pass(pair, pair.target))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
