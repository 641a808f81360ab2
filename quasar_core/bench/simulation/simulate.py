"""Replay recorded answers under other decisions: windows, draft lengths, who checks; the speed that each would have.

Where a replay comes to a place of which nothing was recorded, it takes the nearest draft, and what the verifier said at
another place, drawn at random, as behind a token that it had wrong. So a policy is replayed several times, each with
draws of its own.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, pstdev

from quasar_core.bench.results import Results
from quasar_core.bench.simulation.traces import Drafted, Recorded, Trace, Verified, beside_passes, record_of
from quasar_core.config import Auto
from quasar_core.decode.costs.pass_costs import LiveCost, PairCosts
from quasar_core.decode.policy.agreement import AgreementCurve, Estimate, RunningAgreement
from quasar_core.decode.policy.check import Check, Checker
from quasar_core.decode.policy.lengths import TYPICAL_ACCEPTANCE, AdaptiveLength, plan_exact
from quasar_core.decode.policy.window_values import MAX_WINDOW
from quasar_core.draft.acceptance import Acceptance
from quasar_core.draft.base import NO_DRAFT, Draft
from quasar_core.records import Stats

LONGEST = 64  # drafts are no longer than recorded
REPLAYS = 3  # of each policy
NOTHING = Drafted((), 0)


@dataclass(frozen=True)
class Policy:
    """How `exact` may decide: step by step, or by a window's limit and threshold; or the target checks all drafts."""

    name: str
    limit: int | None = None  # of a window; None: as it is worth most at each step
    threshold: float = 0.0
    longest: int = LONGEST  # tokens of a draft
    target_alone: bool = False
    like: str | None = None  # the arm that decides so, of which the speed may have been measured


POLICIES = (
    Policy("as it pays", like="exact"),
    *(Policy(f"window {limit}", limit) for limit in (2, 4, 8, 16, 32)),
    *(Policy(f"survival {threshold}", MAX_WINDOW, threshold) for threshold in (0.5, 0.8, 0.9)),
    *(Policy(f"drafts of {longest}", longest=longest) for longest in (2, 4, 8)),
    Policy("no drafts", longest=0),
    Policy("target alone", target_alone=True, like="full"),
    Policy("target alone, no drafts", longest=0, target_alone=True, like="vanilla"),
)


@dataclass(frozen=True)
class Prediction:
    """Tokens per second that a policy would reach, and what was measured where an arm decided so.

    `predicted` is the mean of the replays, `spread` their standard deviation: what the draws leave open.
    """

    policy: str
    predicted: float
    measured: float | None
    spread: float = 0.0

    @property
    def ratio(self) -> float | None:
        """Predicted ÷ measured."""
        return self.predicted / self.measured if self.measured else None


def simulate(results: Results, arm: str = "exact", replays: int = REPLAYS) -> list[Prediction]:
    """Replay an arm's answers under every policy. UsageError where the file does not hold what that needs."""
    recorded = record_of(results, arm)
    return [
        predict(_beside(recorded, results, policy), policy, replays, _measured(results, policy.like))
        for policy in _policies(arm, results.run.config.window)
    ]


def predict(recorded: Recorded, policy: Policy, replays: int, measured: float | None) -> Prediction:
    """Replay a policy with draws of its own each time: the mean of the speeds, and their spread."""
    speeds = [replay(recorded, policy, seed) for seed in range(replays)]
    return Prediction(policy.name, fmean(speeds), measured, pstdev(speeds))


def _beside(recorded: Recorded, results: Results, policy: Policy) -> Recorded:
    """With what passes of the arm that decides as the policy does take beside them, where there is one."""
    stats = _stats(results, policy.like)
    if not stats:
        return recorded
    drafting_s, other_s = beside_passes(stats)
    return replace(recorded, drafting_s=drafting_s, other_s=other_s)


def _policies(arm: str, window: int | Auto) -> list[Policy]:
    """What was recorded first."""
    if window == "auto":
        return list(POLICIES)
    own = Policy(f"window {window}", window, like=arm)
    others = [replace(policy, like=None) if policy.like == arm else policy for policy in POLICIES]
    return [own, *(policy for policy in others if policy.name != own.name)]


def _measured(results: Results, arm: str | None) -> float | None:
    stats = _stats(results, arm)
    seconds = sum(one.decode_s for one in stats)
    return sum(one.new_tokens - one.prefill_tokens for one in stats) / seconds if seconds else None


def _stats(results: Results, arm: str | None) -> list[Stats]:
    return [row.stats for row in results.rows if row.arm == arm and row.stats and row.stats.step_log]


def replay(recorded: Recorded, policy: Policy, seed: int = 0) -> float:
    """Tokens per second of all answers together."""
    replayed = _Replay(recorded, policy, seed)
    for trace in recorded.traces:
        replayed.answer(trace)
    return replayed.tokens / replayed.seconds


class _Replay:
    """One policy over the answers, in turn: what it learns is kept between them."""

    def __init__(self, recorded: Recorded, policy: Policy, seed: int) -> None:
        self.recorded, self.policy, self.luck = recorded, policy, random.Random(seed)
        self.verified = [one for trace in recorded.traces for one in trace.verified.values()]
        self.drafted = [one for trace in recorded.traces for one in trace.drafted.values()]
        self.lost = [one for trace in recorded.traces for one in trace.lost] or self.verified
        self.lost_drafts = [one for trace in recorded.traces for one in trace.lost_drafts] or self.drafted
        self.agreement = RunningAgreement(AgreementCurve(recorded.margins))
        self.verify_cost, self.confirm_cost = LiveCost(recorded.costs.verify), LiveCost(recorded.costs.confirm)
        self.costs = PairCosts(self.verify_cost, self.confirm_cost)
        self.by_target = Acceptance()
        self.at_verifier = AdaptiveLength(self.verify_cost)
        drafts = policy.longest > 0 and any(one.offered.tokens for one in self.drafted)
        plan = plan_exact(self.costs, self.agreement.now, TYPICAL_ACCEPTANCE if drafts else 0.0)  # as decoding begins
        self.checker = Checker(self.costs, self.agreement, [plan.usual], plan.target_alone)
        self.tokens, self.seconds = 0, 0.0

    def answer(self, trace: Trace) -> None:
        """Decode the answer again."""
        place = 0
        self._move_to(trace.prompt)
        self.at_verifier.begin()
        self.checker.begin()
        window: list[tuple[Estimate, bool]] = []
        while place < trace.tokens:
            self._move_to(trace.prompt + place)
            alive = all(agrees for _, agrees in window)
            start = place + len(window)
            draft = self._draft(trace, start, alive)
            check = self._choose(draft, window)
            last = self.policy.limit is None  # then one token that is left is the target's in any case
            ends = alive and start >= trace.tokens - last
            if check.by_target or ends:
                bare = ends or (self.policy.limit is not None and not self.policy.target_alone)
                place += self._confirm(window, NOTHING if bare else self._checked(trace, start, draft, check), alive)
                window = []
            else:
                self._verify(trace, place, window, self._checked(trace, start, draft, check))
        self.tokens += trace.tokens

    def _draft(self, trace: Trace, place: int, alive: bool) -> Drafted:
        known = trace.drafted.get(place) or trace.rests.get(place) or trace.nearest_draft(place) or NOTHING
        draft = known if alive else self.luck.choice(self.lost_drafts)
        return draft.first(self.policy.longest) if self.policy.longest else NOTHING

    def _checked(self, trace: Trace, place: int, draft: Drafted, check: Check) -> Drafted:
        """What is checked of a draft at a place; of one that was not checked there the nearest tells what was right."""
        if draft.length or not draft.left_out:
            return draft.checked(check.length, trace.drafted.get(place + draft.length + 1))
        nearest = trace.nearest_draft(place, draft.left_out[0])
        pieces = draft.offered.first(check.length).pieces
        return Drafted(pieces, min(nearest.right, check.length) if nearest else 0)

    def _choose(self, draft: Drafted, window: Sequence[tuple[Estimate, bool]]) -> Check:
        survival = 1.0
        for estimate, _ in window:
            survival *= estimate.p
        if self.policy.target_alone:
            return Check(True, draft.length, 0.0)
        if self.policy.limit is not None:
            due = len(window) >= self.policy.limit or survival < self.policy.threshold
            return Check(due, 0 if due else draft.length, 0.0)
        offered = at_verifier = draft.offered
        if not self.recorded.cut:  # some of its passes have no draft: they are the measure of the others
            at_verifier = self.at_verifier.cut(offered) if self.at_verifier.limit > 0 else NO_DRAFT
        by_target, by_verifier = self.by_target.of(offered), self.at_verifier.acceptance.of(at_verifier)
        return self.checker.choose(len(window), survival, by_target, by_verifier, whole=self.recorded.cut)

    def _verify(self, trace: Trace, place: int, window: list[tuple[Estimate, bool]], draft: Drafted) -> None:
        """A verify pass: the verifier takes drafted tokens while they are right and it says what the target says."""
        tokens: list[Verified] = []
        for offset in range(max(draft.length, draft.right + draft.gained) + 1):
            alive = all(agrees for _, agrees in window) and all(token.agrees for token in tokens)
            known = trace.verified.get(place + len(window) + offset) or self.luck.choice(self.verified)
            tokens.append(known if alive else self.luck.choice(self.lost))
            if offset >= draft.right + draft.gained or not tokens[-1].agrees:
                break
        accepted = len(tokens) - 1
        refused = accepted < draft.length
        estimates = self.agreement.estimates([token.margin for token in tokens], accepted, refused)
        window += zip(estimates, [token.agrees for token in tokens], strict=True)
        seconds = self.costs.verify(draft.passed + 1)
        self.at_verifier.learn(
            Draft((0,) * draft.length, draft.pieces),
            min(accepted, draft.right),
            self.recorded.drafting_s,
            seconds,
            draft.branches,
            max(accepted - draft.right, 0),
        )
        self.by_target.count(draft.pieces, draft.right)
        self.checker.verified()
        self._spend(seconds)

    def _confirm(self, window: list[tuple[Estimate, bool]], draft: Drafted, alive: bool) -> int:
        """A target pass over window and draft; the tokens that it commits."""
        accepted = next((i for i, (_, agrees) in enumerate(window) if not agrees), len(window))
        committed = accepted + 1 + (draft.right + draft.gained if alive else 0)
        passed = len(window) + 1 + draft.passed
        if alive:
            self.by_target.count(draft.pieces, draft.right)
        self.checker.confirmed([estimate for estimate, _ in window], accepted)
        self._spend(self.costs.confirm(passed))
        return committed

    def _move_to(self, positions: int) -> None:
        self.verify_cost.move_to(positions)
        self.confirm_cost.move_to(positions)

    def _spend(self, seconds: float) -> None:
        beside = self.recorded.drafting_s + self.recorded.other_s
        self.checker.spent(beside)
        self.seconds += seconds + beside
