"""Tokens per second that each mode may be expected to reach, from the costs of passes and the verifier's margins."""

from dataclasses import dataclass

from quasar_core.decode.costs import PairCosts, PassCost
from quasar_core.decode.draft_length import expected_pass
from quasar_core.decode.window import TYPICAL_ACCEPTANCE, AgreementCurve, WindowPolicy, best_window
from quasar_core.records import MarginTable

ALWAYS = MarginTable([], [10**9], [10**9])  # of a verifier that always agrees: no real one does better


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
    """How `exact` decodes: in windows of this policy, or with the target verifying the drafts itself."""

    window: WindowPolicy
    target_alone: bool
    rate: float


def pass_rate(cost: PassCost, acceptance: float) -> float:
    """Tokens per second where one model's passes are all there is."""
    tokens, seconds = expected_pass(acceptance, cost)
    return tokens / seconds


def plan_exact(costs: PairCosts, margins: MarginTable, acceptance: float = TYPICAL_ACCEPTANCE) -> ExactPlan:
    """The faster of two ways to the same output."""
    window, rate = best_window(AgreementCurve(margins), costs, acceptance)
    alone = pass_rate(costs.confirm, acceptance)
    return ExactPlan(window, alone >= rate, max(alone, rate))


def predict_rates(costs: PairCosts, margins: MarginTable | None, acceptance: float = TYPICAL_ACCEPTANCE) -> Rates:
    """What the modes may be expected to reach, at an acceptance that is typical of n-gram drafts."""
    return Rates(
        plain=1.0 / costs.confirm(1),
        full=pass_rate(costs.confirm, acceptance),
        quantized=pass_rate(costs.verify, acceptance),
        exact=plan_exact(costs, margins, acceptance).rate if margins else None,
    )
