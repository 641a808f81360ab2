"""Choose what the verifier sees of a long text: all of it, or its first few and its last positions."""

import time
from collections.abc import Callable
from dataclasses import replace

from quasar_core.config import GenerationConfig
from quasar_core.decode.costs import CONTEXT, pass_sampler
from quasar_core.errors import UsageError
from quasar_core.models.decoder import LeanDecoder
from quasar_core.models.narrow import SEEN, SINKS, narrowed, why_not_narrow
from quasar_core.models.pair import Pair
from quasar_core.timing import time_in_turn

SHORTEST = 2 * (SINKS + SEEN)  # tokens of a prompt, from which on costs are asked
FAR = 4096  # positions before the pass that is timed for its context
SECONDS = 0.4
# The share of a pass that must be saved: verifying is only a part of the time, and what is not seen costs agreement.
# Published is 0.975 of the acceptance at 16k and 0.89 in retrieval (TriForce); small models lose more.
LEAST_SAVED = 0.5

Note = Callable[[str], None]


class Sight:
    """The pair that answers a prompt: its verifier sees everything, or less where that is asked for or pays."""

    def __init__(
        self, pair: Pair, config: GenerationConfig, note: Note, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._pair, self._asked, self._note, self._now = pair, config.verifier_attention, note, now
        self._narrow: Pair | None = None
        self._slope: tuple[float, float] | None = None  # seconds of a pass at no context, and of each position more
        self._may_choose = self._asked == "auto" and config.verify == "exact"
        if self._asked == "sinks+window":
            self._refuse()
            self._note(_described(config))

    def pair_for(self, prompt: int) -> Pair:
        """The pair for a prompt of so many tokens."""
        if self._asked == "sinks+window" or (self._may_choose and prompt >= SHORTEST and self._pays(prompt)):
            return self._narrowed()
        return self._pair

    def _refuse(self) -> None:
        verifier = self._pair.verifier
        obstacle = "there is no verifier" if verifier is None else why_not_narrow(verifier)
        if obstacle:
            raise UsageError(f"--verifier-attention sinks+window: {obstacle}.")

    def _narrowed(self) -> Pair:
        if self._narrow is None:
            assert isinstance(self._pair.verifier, LeanDecoder)
            self._narrow = replace(self._pair, verifier=narrowed(self._pair.verifier))
        return self._narrow

    def _pays(self, prompt: int) -> bool:
        """Whether a pass that sees less saves enough at this context, by the measured slope of its cost."""
        verifier = self._pair.verifier
        if not isinstance(verifier, LeanDecoder) or why_not_narrow(verifier):
            return False
        if self._slope is None:
            self._slope = measured_slope(self._pair, verifier, self._now)
            base, slope = self._slope
            self._note(
                f"verifier: a pass takes {1000 * base:.3g} ms, and {1000 * slope * 1000:.3g} ms more for each 1000 "
                f"positions that it sees; it sees the first {SINKS} and the last {SEEN} where that saves "
                f"{LEAST_SAVED:.0%} or more"
            )
        return saved_share(*self._slope, prompt) >= LEAST_SAVED


def saved_share(base: float, slope: float, positions: int) -> float:
    """Of a pass over so many positions, what seeing less saves."""
    return slope * max(positions - SINKS - SEEN, 0) / (base + slope * positions)


def measured_slope(pair: Pair, model: LeanDecoder, now: Callable[[], float] = time.perf_counter) -> tuple[float, float]:
    """Seconds of a pass of one token without context, and what each position more adds."""
    far = min(FAR, pair.max_context - 1, (model.switches_at or FAR) - 1)  # within one table of rotations
    cache = model.new_cache(far + 1)
    for states in cache.layers:
        states.zero_()  # what is read takes as long whatever it is, but for numbers that are none

    def at(positions: int) -> Callable[[], float]:
        sample = pass_sampler(model, cache, 1, now)

        def timed() -> float:
            cache.rollback(0)
            cache.advance(positions)
            return sample()

        return timed

    timings = time_in_turn({place: at(place) for place in (CONTEXT, far)}, SECONDS, now=now)
    near, distant = timings[CONTEXT].seconds, timings[far].seconds
    slope = max(distant - near, 0.0) / max(far - CONTEXT, 1)
    return max(near - slope * CONTEXT, 0.1 * near), slope


def _described(config: GenerationConfig) -> str:
    """What it means for the text."""
    sees = f"the verifier sees the first {SINKS} and the last {SEEN} positions"
    if config.verify == "quantized":
        return f"verifier: {sees}, and so writes another text than with --verifier-attention full"
    return f"verifier: {sees}; the target, which confirms, sees everything"
