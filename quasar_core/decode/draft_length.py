"""How long to draft: the length that yields the most tokens for its cost, given how drafts have fared so far."""

from dataclasses import dataclass
from typing import Protocol

from quasar_core.decode.costs import PassCost
from quasar_core.draft.base import Draft

MAX_DRAFT = 15
PRIOR_TRIALS = 4.0
PRIOR_ACCEPTANCE = {1: 0.4, 2: 0.6, 3: 0.75}
# Costs are measured to a few percent: plain decoding must look faster by more than that to be preferred.
COST_ERROR = 0.03
# Old trials fade, as texts change; while a drafter does not pay they fade too, so that it is tried again.
FADING = 0.99
FADING_UNTRIED = 0.99
# What trying may lose: this share of plain decoding's time, and a few passes at once.
ALLOWANCE = 0.02
MAX_CREDIT = 3.0


class DraftLength(Protocol):
    """How many tokens of a draft to verify."""

    @property
    def limit(self) -> int:
        """The longest draft worth asking for."""
        ...

    def cut(self, draft: Draft) -> Draft:
        """The draft, shortened to what pays."""
        ...

    def learn(self, draft: Draft, accepted: int) -> None:
        """`accepted` tokens of the verified draft were right."""
        ...


@dataclass(frozen=True)
class FixedLength:
    """Always the same length."""

    limit: int

    def cut(self, draft: Draft) -> Draft:
        """Drafts come no longer than asked for."""
        return draft

    def learn(self, draft: Draft, accepted: int) -> None:
        """Nothing to learn."""


class AdaptiveLength:
    """Estimates P(next draft token is right | match length) and maximises expected tokens ÷ cost of the pass.

    A draft of k tokens of acceptance a yields 1 + a + … + a^k tokens for cost(k + 1). Estimates err, so an account is
    kept of what drafts have cost beyond plain decoding: they are left out while it is overdrawn, whatever they promise.
    """

    def __init__(self, cost: PassCost) -> None:
        self.cost = cost
        self.limit = MAX_DRAFT
        self._right: dict[int, float] = {}
        self._tried: dict[int, float] = {}
        self._credit = MAX_CREDIT  # in passes of one token

    def acceptance(self, match_length: int) -> float:
        """The running estimate, which starts at the prior."""
        prior = PRIOR_ACCEPTANCE.get(match_length, PRIOR_ACCEPTANCE[3])
        right = self._right.get(match_length, 0.0) + prior * PRIOR_TRIALS
        return right / (self._tried.get(match_length, 0.0) + PRIOR_TRIALS)

    def cut(self, draft: Draft) -> Draft:
        """Keep the length of the best expected rate; none where plain decoding is as fast, or drafts have lost much."""
        self._credit = min(self._credit + ALLOWANCE, MAX_CREDIT)
        if not draft.tokens:
            return draft
        best = best_length(self.acceptance(draft.match_length), self.cost, len(draft.tokens))
        if best == 0 or self._credit <= 0:
            self._fade(draft.match_length, FADING_UNTRIED)
            return Draft((), draft.match_length)
        return Draft(draft.tokens[:best], draft.match_length)

    def learn(self, draft: Draft, accepted: int) -> None:
        """A refused token is one trial more; tokens behind it were never tried."""
        if not draft.tokens:
            return
        self._fade(draft.match_length, FADING)
        self._right[draft.match_length] += accepted
        self._tried[draft.match_length] += accepted + (accepted < len(draft.tokens))
        gained = accepted + 1 - self.cost(len(draft.tokens) + 1) / self.cost(1)
        self._credit = min(self._credit + gained, MAX_CREDIT)

    def _fade(self, match_length: int, factor: float) -> None:
        for counts in (self._right, self._tried):
            counts[match_length] = counts.get(match_length, 0.0) * factor


def best_length(acceptance: float, cost: PassCost, longest: int) -> int:
    """The k from 0 to `longest` that maximises (1 + a + … + a^k) ÷ cost(k + 1); 0 must win by more than COST_ERROR."""
    best, best_rate, expected, power = 0, (1.0 - COST_ERROR) / cost(1), 1.0, 1.0
    for k in range(1, longest + 1):
        power *= acceptance
        expected += power
        rate = expected / cost(k + 1)
        if rate > best_rate:
            best, best_rate = k, rate
    return best


def expected_pass(acceptance: float, cost: PassCost, longest: int = MAX_DRAFT) -> tuple[float, float]:
    """Tokens and seconds of a pass whose draft has the best length for this acceptance."""
    length = best_length(acceptance, cost, longest)
    return sum(acceptance**i for i in range(length + 1)), cost(length + 1)
