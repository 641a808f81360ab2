"""Decide at each step of `exact` which of the two models checks the draft: the verifier, or the target at once."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from quasar_core.decode.costs.pass_costs import TABLE, Cost, PairCosts
from quasar_core.decode.policy.agreement import Estimate, RunningAgreement
from quasar_core.decode.policy.draft_values import worths_at_target, worths_of_rest
from quasar_core.decode.policy.window_values import (
    Means,
    Prospect,
    WindowValues,
    best_values,
    better_values,
    prospect_of,
)

FIRST_PLANNED, REPLANNED = 8, 32  # target passes: values are found anew after so many, twice as many, …, every so many
COSTS_DIFFER = 0.03  # costs of one token, from one text to the next, for values to be found anew
LATELY, KINDS = 64, 12  # drafts that tell what may turn up, and how many stand for them
UNSEEN = 64  # target passes after which the verifier is tried again where it does not seem to pay; then twice as many
STEPS = 16  # of which what they take beside their passes is learned
RARELY = 8  # where it was not asked since, one draft in so many is weighed for it


@dataclass(frozen=True)
class Check:
    """Who checks a draft, and how many of its tokens."""

    by_target: bool
    length: int
    worth: float  # tokens to be had from it, less the tokens that its time is worth


def choose_check(
    window: int,
    survival: float,
    by_target: Sequence[float],
    by_verifier: Sequence[float],
    agreement: Means,
    costs: PairCosts,
    values: WindowValues,
    *,
    whole: bool = False,
    rests: Sequence[float] | None = None,
) -> Check:
    """Choose model and length so that the tokens to be committed, less rate × seconds, are most.

    The window holds W = `window` tokens, right with probability s = `survival`. The draft's j-th token is the
    target's with chance a_j (`by_target`), the verifier's with chance b_j (`by_verifier`), each if those before are.
    What the window itself is expected to yield is had either way, and left out. In one pass,

    - the target confirms the window and checks j tokens behind it, of which s·(a_1 + a_1·a_2 + … + a_1⋯a_j) and a
      bonus are expected, and what is left of the draft is there for later passes (`draft_values.py`);
    - the verifier checks j tokens, accepts r of them with P(r) = b_1⋯b_r·(1 − b_{r+1}), and the window goes on with
      n = r + 1 more:  −rate·verify(1 + j) + Σ_r P(r)·[s·(p_1 + p_1·p_2 + … + p_1⋯p_n) + J(W + n, s·p_1⋯p_n)],
      where p_i is the `agreement` of such a token and J is what a window is worth (`window_values.py`).

    With `whole`, a draft is checked in full or, where the target only confirms, not at all. `rests` as of
    `worths_at_target`.
    """
    target = _best(worths_at_target(window, survival, by_target, costs.confirm, values.rate, rests), whole)
    if window >= values.longest:
        return Check(True, target[0], target[1])
    verifier = _best_at_verifier(window, survival, by_verifier, agreement, costs.verify, values, whole)
    return Check(True, *target) if target[1] >= verifier[1] else Check(False, *verifier)


def _best_at_verifier(
    window: int,
    survival: float,
    chances: Sequence[float],
    agreement: Means,
    verify: Cost,
    values: WindowValues,
    whole: bool,
) -> tuple[int, float]:
    """The length at which a verify pass is worth most, and what it is worth."""
    gained, alive, reached, settled = 0.0, survival, 1.0, 0.0
    worths = []

    def outcome(length: int, last: float) -> float:
        """Of `length` accepted tokens and another, with which the target agrees at a chance of `last`."""
        return gained + alive * last + values(window + length + 1, alive * last)

    for length in range(len(chances) + 1):
        worths.append(settled + reached * outcome(length, agreement.free) - values.rate * verify(1 + length))
        if length < len(chances):
            settled += reached * (1 - chances[length]) * outcome(length, agreement.instead)
            reached *= chances[length]
            alive *= agreement.drafted
            gained += alive
    return (len(chances), worths[-1]) if whole else _best(worths, whole=False)


def _best(worths: Sequence[float], whole: bool) -> tuple[int, float]:
    """The length of the largest worth, the shortest of equal ones; with `whole`, none or all."""
    lengths = {0, len(worths) - 1} if whole else range(len(worths))
    best = max(sorted(lengths), key=worths.__getitem__)
    return best, worths[best]


class Checker:
    """Follows what passes cost, what drafts turn up, how often the models agree; decides who checks the next draft.

    Time is worth the best rate that these allow: then a fresh window is worth nothing, whoever checked last, and
    neither model is favoured by drafts that turn out otherwise than expected. No clock enters but by the costs.
    Whether the verifier is of use is decided while decoding: where it is not, weighing it is all that is lost, and
    that is done rarely. `alone` says that it seems to be of none before anything was decoded.
    """

    def __init__(
        self, costs: PairCosts, agreement: RunningAgreement, usual: Sequence[Prospect], alone: bool = False
    ) -> None:
        self.costs, self.agreement = costs, agreement
        self._prospects = deque(usual, maxlen=LATELY)
        self._passes, self._replanned = 0, FIRST_PLANNED
        self._besides: deque[float] = deque(maxlen=STEPS)
        self._unseen, self._patience = (UNSEEN + 1, 2 * UNSEEN) if alone else (0, UNSEEN)
        self._means = agreement.means
        self._known = self._costs_of_steps()
        self.values = best_values(agreement.now, usual, self._known)

    @property
    def rate(self) -> float:
        """Tokens per second that are expected at best."""
        return self.values.rate

    @property
    def longest(self) -> int:
        """The window of sure tokens that is confirmed although no draft turns up."""
        for window in range(1, self.values.longest):
            if choose_check(window, 1.0, (), (), self.agreement.means, self.costs, self.values).by_target:
                return window
        return self.values.longest

    def choose(
        self,
        window: int,
        survival: float,
        by_target: Sequence[float],
        by_verifier: Sequence[float],
        whole: bool = False,
    ) -> Check:
        """As `choose_check`; where the verifier was not seen for long, it checks a step that has no window."""
        costs, rate = self._known, self.values.rate
        rests = worths_of_rest(by_target, costs.confirm, rate)
        if not window and UNSEEN < self._unseen < self._patience and self._unseen % RARELY:
            return Check(True, *_best(worths_at_target(0, 1.0, by_target, costs.confirm, rate, rests), whole))
        self._prospects.append(prospect_of(by_target, by_verifier, costs, rate, whole, rests))
        check = choose_check(
            window, survival, by_target, by_verifier, self._means, costs, self.values, whole=whole, rests=rests
        )
        if check.by_target and not window and self._unseen >= self._patience:
            self._patience *= 2
            return Check(False, len(by_verifier), check.worth)
        return check

    def begin(self) -> None:
        """Another text begins, where passes may cost something else; where they hardly do, values stay."""
        now, then = self._costs_of_steps(), self._known
        pairs = (now.verify(1), then.verify(1)), (now.confirm(1), then.confirm(1))
        if any(abs(new / old - 1) > COSTS_DIFFER for new, old in pairs):
            self._replan()

    def spent(self, seconds: float) -> None:
        """A step took so long beside its passes: time that a step more costs, whoever checks."""
        self._besides.append(seconds)

    def verified(self) -> None:
        """The verifier made a pass."""
        self._unseen = 0

    def confirmed(self, estimates: Sequence[Estimate], accepted: int) -> None:
        """The target made a pass; of the window's tokens, of these estimates, it took `accepted`."""
        self.agreement.learn(estimates, accepted)
        self._means = self.agreement.means
        self._unseen += 1
        self._passes += 1
        if self._passes == self._replanned:
            self._replanned += min(self._passes, REPLANNED)
            self._replan()

    def _replan(self) -> None:
        self._known = self._costs_of_steps()
        self.values = better_values(self.agreement.now, _spread(self._prospects), self._known, self.rate)

    def _costs_of_steps(self) -> PairCosts:
        """Those of passes, and of what a step takes beside them: drafting, choosing tokens and what follows."""
        beside = sorted(self._besides)[len(self._besides) // 2] if self._besides else 0.0
        return PairCosts(_Table(self.costs.verify, beside), _Table(self.costs.confirm, beside))


class _Table:
    """A cost with what a step takes beside its pass, looked up: a decision asks for many."""

    def __init__(self, cost: Cost, beside: float) -> None:
        self._cost, self._beside, self._seconds = cost, beside, [cost(tokens) + beside for tokens in range(1, TABLE)]

    def __call__(self, tokens: int) -> float:
        return self._seconds[tokens - 1] if tokens < TABLE else self._cost(tokens) + self._beside


def _spread(prospects: Sequence[Prospect]) -> list[Prospect]:
    """Few prospects for many: in the order of what they bring, the one in the middle of each of KINDS equal parts."""
    ordered = sorted(prospects, key=lambda prospect: (prospect.right, prospect.new))
    count = min(KINDS, len(ordered))
    return [ordered[(2 * i + 1) * len(ordered) // (2 * count)] for i in range(count)]
