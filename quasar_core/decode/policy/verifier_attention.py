"""Choose what the verifier sees of a long text: all of it, or its first few and its last positions."""

from collections.abc import Callable
from dataclasses import replace

from quasar_core.config import GenerationConfig
from quasar_core.decode.costs.cost_records import cost_record
from quasar_core.decode.costs.pass_costs import CONTEXT
from quasar_core.errors import UsageError
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.pair import Pair
from quasar_core.models.verifier.narrow import SEEN, SINKS, narrowed, why_not_narrow

SHORTEST = 2 * (SINKS + SEEN)  # tokens of a prompt, from which on costs are asked
# The share of a pass that must be saved: verifying is only a part of the time, and what is not seen costs agreement.
# Published is 0.975 of the acceptance at 16k and 0.89 in retrieval (TriForce); small models lose more.
LEAST_SAVED = 0.5

Note = Callable[[str], None]


class VerifierAttention:
    """The pair that answers a prompt: its verifier sees everything, or less where that is asked for or pays."""

    def __init__(self, pair: Pair, config: GenerationConfig, note: Note) -> None:
        self._pair, self._asked, self._note = pair, config.verifier_attention, note
        self._narrow: Pair | None = None
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
        cost = cost_record(self._pair, "verifier").cost
        slope = cost.slope(1) if cost.slope else 0.0
        base = max(cost(1) - slope * CONTEXT, 0.1 * cost(1))
        self._note(
            f"verifier: a pass takes {1000 * base:.3g} ms, and {1000 * slope * 1000:.3g} ms more for each 1000 "
            f"positions that it sees; it sees the first {SINKS} and the last {SEEN} where that saves "
            f"{LEAST_SAVED:.0%} or more"
        )
        return saved_share(base, slope, prompt) >= LEAST_SAVED


def saved_share(base: float, slope: float, positions: int) -> float:
    """Of a pass over so many positions, what seeing less saves."""
    return slope * max(positions - SINKS - SEEN, 0) / (base + slope * positions)


def _described(config: GenerationConfig) -> str:
    """What it means for the text."""
    sees = f"the verifier sees the first {SINKS} and the last {SEEN} positions"
    if config.verify == "quantized":
        return f"verifier: {sees}, and so writes another text than with --verifier-attention full"
    return f"verifier: {sees}; the target, which confirms, sees everything"
