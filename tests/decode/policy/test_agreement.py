"""P(agree | margin): the curve, and its correction by what the target makes of the tokens."""

import math
import random

import pytest

from quasar_core.decode.policy.agreement import FIRST_SHIFTS, AgreementCurve, Kind, RunningAgreement, shift_to
from quasar_core.records import MarginTable

CURVE = AgreementCurve(MarginTable([0.5, 2.0], [500, 1500, 8000], [300, 1350, 7980]))


def test_at_first_it_is_the_curve() -> None:
    running = RunningAgreement(CURVE)
    assert [running(margin) for margin in (0.1, 1.0, 9.0)] == pytest.approx([CURVE(m) for m in (0.1, 1.0, 9.0)])


@pytest.mark.parametrize("true_shift", [-2.0, -0.7, 0.0, 0.7])
def test_text_that_is_harder_or_easier_by_an_odds_ratio_is_learned(true_shift: float) -> None:
    truth, running, luck = RunningAgreement(CURVE, true_shift), RunningAgreement(CURVE), random.Random(0)
    for _ in range(400):
        margins = luck.choices((0.1, 1.0, 9.0), CURVE.weights.tolist(), k=8)
        rights = [luck.random() < truth(margin) for margin in margins]
        accepted = rights.index(False) if False in rights else 8
        running.learn(running.estimates(margins, 0, False), accepted)
    assert running.now.mean == pytest.approx(truth.now.mean, abs=0.02)


def test_one_refusal_by_hand() -> None:
    """Newton's step: the information is 4 + p(1 − p), the gradient −p."""
    running = RunningAgreement(CURVE)
    p = running(0.1)
    running.learn(running.estimates([0.1, 9.0], 0, False), 0)
    assert running.shift() == running.shift(Kind.FREE) == pytest.approx(-p / (4 + p * (1 - p)))
    assert running.shift(Kind.INSTEAD) == 0
    assert running.shift(Kind.DRAFTED) == FIRST_SHIFTS[Kind.DRAFTED]


def test_what_was_drafted_too_is_surer_from_the_start() -> None:
    """Else no draft goes to the verifier, and that they agree is never learned."""
    running = RunningAgreement(CURVE)
    drafted, free = (running(1.0, kind) for kind in (Kind.DRAFTED, Kind.FREE))
    assert drafted / (1 - drafted) == pytest.approx(free / (1 - free) * math.exp(FIRST_SHIFTS[Kind.DRAFTED]))


def test_behind_a_refused_token_nothing_is_learned() -> None:
    one, other = RunningAgreement(CURVE), RunningAgreement(CURVE)
    one.learn(one.estimates([1.0, 0.6], 0, False), 1)
    other.learn(other.estimates([1.0, 0.6, 0.1, 0.1], 0, False), 1)
    assert one.shift() == other.shift()


def test_what_came_instead_of_a_draft_is_learned_apart() -> None:
    running = RunningAgreement(CURVE)
    for _ in range(50):
        running.learn(running.estimates([1.0, 1.0], 1, True), 1)
    means = running.means
    assert means.drafted > CURVE.values @ CURVE.weights > means.instead
    assert running.shift(Kind.FREE) == 0


def test_the_shift_that_reaches_a_mean() -> None:
    assert RunningAgreement(CURVE, shift_to(CURVE, 0.8)).now.mean == pytest.approx(0.8, abs=1e-6)
