"""Choose draft lengths and windows by the costs of passes and the acceptance of drafts and verified tokens so far.

How long to draft, and whether at all; when to confirm; whether a verifier pays; what rates may be expected of it all.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median_low
from typing import Protocol

from quasar_core.decode.costs.pass_costs import DOUBTFUL, KNOWN, Cost, LiveCost, PairCosts
from quasar_core.decode.policy.agreement import AgreementCurve, agreements_of
from quasar_core.decode.policy.window_values import Agreements, Prospect, best_values
from quasar_core.draft.acceptance import Acceptance
from quasar_core.draft.base import NO_DRAFT, Draft
from quasar_core.records import MarginTable

MAX_DRAFT = 15
# Costs are measured to a few percent: plain decoding must look faster by more than that to be preferred.
COST_ERROR = 0.03
FADING_UNTRIED = 0.99  # of trials, while a drafter does not pay: so that it is tried again
# What trying may lose, in passes of one token: a share of each, and so many at once; what drafts gain, they may lose.
ALLOWANCE = 0.01
FIRST_BUDGET, LEAST_BUDGET, MAX_BUDGET = 1.5, 0.75, 24.0
MAX_DEBT = 1.5  # paid off in 150 passes: charges may be another program's doing
# What a pass of unknown cost may be charged at most: its time may be another program's.
MAX_CHARGE = 4.0
JITTER = 5e-4  # seconds that any pass may take longer by chance: much, where a pass takes less than that
ASKED = 9  # times that the drafter was asked, of which the median counts
# Of so many passes one has no draft: of the more, the more drafts yield.
PLAIN_EVERY, PLAIN_AT_LEAST = 4, 64
PROBED = 3  # tokens of a draft that is tried for what its pass costs

DEFAULT_WINDOW = 8
LEAST_GAIN = 0.01  # of the rate, for which the verifier is worth asking at all
# Of a token that n-grams draft, where the pass of any draft costs the same: 1.5 tokens a verify. The choice of the
# window depends on it weakly.
TYPICAL_ACCEPTANCE = 1 / 3

# How long to draft


class DraftLength(Protocol):
    """How many tokens of a draft to verify."""

    @property
    def acceptance(self) -> Acceptance:
        """How often draft tokens were right."""
        ...

    @property
    def limit(self) -> int:
        """The longest draft worth asking for now; with 0 the drafter is left in peace."""
        ...

    def cut(self, draft: Draft) -> Draft:
        """The draft, shortened to what pays."""
        ...

    def learn(self, draft: Draft, accepted: int, drafting_s: float = 0.0, pass_s: float | None = None) -> None:
        """`accepted` tokens of the verified draft were right; seconds of drafting, and of the pass if timed."""
        ...


@dataclass(frozen=True)
class FixedLength:
    """Always the same length."""

    limit: int
    acceptance: Acceptance = field(default_factory=Acceptance, compare=False)

    def cut(self, draft: Draft) -> Draft:
        """Drafts come no longer than asked for."""
        return draft

    def learn(self, draft: Draft, accepted: int, drafting_s: float = 0.0, pass_s: float | None = None) -> None:
        """Count what was right: the length stays."""
        self.acceptance.count(draft.pieces, accepted)


class AdaptiveLength:
    """Estimates P(a draft token is right | source, sureness) and maximises expected tokens ÷ cost of the pass.

    A draft of k tokens of acceptances a_1 … a_k yields 1 + a_1 + a_1·a_2 + … tokens for cost(k + 1). Estimates err,
    so a budget bounds the time lost to rejected drafts and to drafting itself; drafting pauses while it is spent. With
    a LiveCost, which passes correct, some must be made without a draft, the first ones among them: they are the
    measure of all others. With `timed` False somebody else sees to that.
    """

    def __init__(self, cost: Cost, acceptance: Acceptance | None = None, timed: bool = True) -> None:
        self._is_timed = timed and isinstance(cost, LiveCost)
        self.cost = cost if isinstance(cost, LiveCost) else LiveCost(cost)
        self.acceptance = acceptance or Acceptance()
        self._budget = FIRST_BUDGET  # in passes of one token
        self._yield = 0.0  # draft tokens that a pass accepts, lately
        self._measure = self.cost(1)  # by which drafts were charged
        self._rested = 0  # steps in which nothing was asked of the drafter
        self._asking: deque[float] = deque(maxlen=ASKED)  # seconds of drafting

    def begin(self) -> None:
        """Another text begins: drafts may be tried again, if only a little."""
        self._budget = max(self._budget, LEAST_BUDGET)

    @property
    def limit(self) -> int:
        """None while the budget is spent, and where a pass without a draft is due."""
        return 0 if self._budget <= 0 or self._plain_is_due() else MAX_DRAFT

    def cut(self, draft: Draft) -> Draft:
        """Keep the length of the best expected rate; none where plain decoding is as fast, or drafts have lost much."""
        if not draft.tokens or self._budget <= 0:
            return NO_DRAFT
        if self._rested:
            self.acceptance.fade_all(FADING_UNTRIED**self._rested)
            self._rested = 0
        longest = self._affordable(len(draft.tokens))
        best = best_length(self.acceptance.of(draft)[:longest], self.cost)
        if best == 0:
            self.acceptance.fade([(piece.source, piece.sureness) for piece in draft.pieces], FADING_UNTRIED)
            best = self._probe(longest)
        return draft.first(best)

    def learn(
        self,
        draft: Draft,
        accepted: int,
        drafting_s: float = 0.0,
        pass_s: float | None = None,
        branches: int = 0,
        gained: int = 0,
    ) -> None:
        """A refused token is one trial more; tokens behind it were never tried.

        Beside the draft's tokens the pass had so many `branches`, which `gained` tokens.
        """
        passed = len(draft.tokens) + 1 + branches
        if pass_s is not None:
            self.cost.observe(passed, pass_s)
        self._budget += ALLOWANCE
        self._forgive()
        if drafting_s:
            self._asking.append(drafting_s)
            self._budget -= min(median_low(self._asking) / self.cost(1), MAX_CHARGE)
        else:
            self._rested += passed == 1
        if draft.tokens:
            self._count(draft, accepted)
        if passed > 1:
            self._budget += accepted + gained + 1 - self._charge(passed, pass_s)
        self._budget = min(max(self._budget, -MAX_DEBT), MAX_BUDGET)

    def _plain_is_due(self) -> bool:
        """Until passes without a draft are known; then now and again."""
        often = min(PLAIN_EVERY * (1 + self._yield) ** 2, PLAIN_AT_LEAST)
        return self._is_timed and (self.cost.seen(1) < KNOWN or self.cost.since_single >= often)

    def _affordable(self, longest: int) -> int:
        """The longest draft that, all of it refused, exceeds the budget by no more than a pass.

        Where plain passes cost something else than what was remembered, longer ones are tried step by step: no more
        than twice the tokens of what is known.
        """
        if self._is_timed and self.cost.is_doubtful:
            known = 1
            while known <= longest and self.cost.seen(known) >= KNOWN:
                known *= 2
            longest = min(longest, max(known - 1, 1))
        most = (2 + self._budget) * self.cost(1)
        while longest > 1 and self.cost(longest + 1) > most:
            longest -= 1
        return longest

    def _probe(self, longest: int) -> int:
        """A short draft although none seems to pay, where nothing is owed and its cost was not seen for long."""
        length = min(PROBED, longest)
        is_due = self._is_timed and self._budget >= LEAST_BUDGET and self.cost.seen(length + 1) < KNOWN
        return length if is_due else 0

    def _charge(self, tokens: int, pass_s: float | None) -> float:
        """What a pass cost, in passes of one token; of sizes that are not known yet its own time counts."""
        plain = self.cost(1)
        expected = self.cost(tokens) / plain
        if pass_s is None or self.cost.seen(tokens) >= KNOWN:
            return expected
        return min(max(pass_s - JITTER, min(pass_s, expected * plain)) / plain, MAX_CHARGE)

    def _forgive(self) -> None:
        """Where the machine has become slower or faster as a whole, charges were made by the wrong measure."""
        if not 1 / DOUBTFUL <= self.cost(1) / self._measure <= DOUBTFUL:
            self._measure, self._budget = self.cost(1), max(self._budget, LEAST_BUDGET)

    def _count(self, draft: Draft, accepted: int) -> None:
        self._yield += 0.1 * (accepted - self._yield)
        self.acceptance.count(draft.pieces, accepted)


def best_length(acceptances: Sequence[float], cost: Cost) -> int:
    """The k that maximises (1 + a_1 + … + a_1⋯a_k) ÷ cost(k + 1); 0 must win by more than COST_ERROR."""
    best, best_rate, expected, power = 0, (1.0 - COST_ERROR) / cost(1), 1.0, 1.0
    for k, acceptance in enumerate(acceptances, start=1):
        power *= acceptance
        expected += power
        rate = expected / cost(k + 1)
        if rate > best_rate:
            best, best_rate = k, rate
    return best


def expected_pass(acceptance: float, cost: Cost, longest: int = MAX_DRAFT) -> tuple[float, float]:
    """Tokens and seconds of a pass whose draft has the best length for this acceptance."""
    length = best_length([acceptance] * longest, cost)
    return sum(acceptance**i for i in range(length + 1)), cost(length + 1)


# When to confirm


@dataclass(frozen=True)
class WindowPolicy:
    """Confirm when the product of P(agree) falls below `threshold`, or at `limit` tokens."""

    limit: int
    threshold: float = 0.0
    agreement: AgreementCurve | None = None

    def survival(self, margin: float) -> float:
        """P(agree) of a token verified with this margin; 1 where nothing is known."""
        return self.agreement(margin) if self.agreement else 1.0

    def is_due(self, tokens: int, survival: float) -> bool:
        """Whether a window of this many tokens, right with probability `survival`, should be confirmed."""
        return tokens >= self.limit or survival < self.threshold


# What to expect


@dataclass(frozen=True)
class Rates:
    """Tokens per second: plain decoding, drafts verified by the target, by the verifier, and confirmed.

    `exact` is None where the verifier's margins are not known.
    """

    plain: float
    full: float
    quantized: float
    exact: float | None


@dataclass(frozen=True)
class ExactPlan:
    """How `exact` decodes: who checks each draft is decided as it comes, or always the target; tokens per second."""

    target_alone: bool
    rate: float
    usual: Prospect  # drafts that may be expected


def pass_rate(cost: Cost, acceptance: float) -> float:
    """Tokens per second where one model's passes are all there is."""
    tokens, seconds = expected_pass(acceptance, cost)
    return tokens / seconds


def plan_exact(costs: PairCosts, agreements: Agreements, acceptance: float = TYPICAL_ACCEPTANCE) -> ExactPlan:
    """The rate of the best decisions, and whether the verifier is any help to it, by more than costs may err."""
    usual = _usual_prospect(costs, acceptance)
    alone = pass_rate(costs.confirm, acceptance)
    rate = best_values(agreements, [usual], costs).rate
    return ExactPlan(rate < alone * (1 + LEAST_GAIN), max(rate, alone), usual)


def _usual_prospect(costs: PairCosts, acceptance: float) -> Prospect:
    """A draft of this acceptance, cut to the best length at either model."""
    at_target, at_verifier = (best_length([acceptance] * MAX_DRAFT, cost) for cost in (costs.confirm, costs.verify))
    right, accepted = (sum(acceptance**i for i in range(1, length + 1)) for length in (at_target, at_verifier))
    return Prospect(right, at_target, 1 + accepted, 1 + at_verifier)


def predict_rates(costs: PairCosts, margins: MarginTable | None, acceptance: float = TYPICAL_ACCEPTANCE) -> Rates:
    """What the modes may be expected to reach, at an acceptance that is typical of n-gram drafts."""
    return Rates(
        plain=1.0 / costs.confirm(1),
        full=pass_rate(costs.confirm, acceptance),
        quantized=pass_rate(costs.verify, acceptance),
        exact=plan_exact(costs, agreements_of(margins), acceptance).rate if margins else None,
    )
