"""What is learned of drafts' tokens, by source and sureness."""

import pytest

from quasar_core.draft.acceptance import FADING, PRIOR_TRIALS, Acceptance, prior
from quasar_core.draft.base import Draft, Piece


def test_an_untried_class_has_its_prior() -> None:
    assert [Acceptance()("x", sureness) for sureness in (-1, 0, 1, 2, 3, 9)] == [0.25, 0.25, 0.4, 0.6, 0.75, 0.75]


def test_each_piece_learns_as_far_as_the_draft_held() -> None:
    acceptance = Acceptance()
    pieces = [Piece("a", 1, 2), Piece("b", 1, 3), Piece("c", 1, 1)]
    acceptance.count(pieces, 3)
    base = prior(1) * PRIOR_TRIALS
    assert acceptance("a", 1) == pytest.approx((base + 2) / (PRIOR_TRIALS + 2))
    assert acceptance("b", 1) == pytest.approx((base + 1) / (PRIOR_TRIALS + 2))  # one right, one wrong
    assert acceptance("c", 1) == prior(1)  # never tried
    assert acceptance("a", 2) == prior(2)


def test_what_was_all_right_has_no_wrong_trial() -> None:
    acceptance = Acceptance()
    acceptance.count([Piece("a", 1, 2), Piece("b", 1, 1)], 3)
    assert acceptance("b", 1) == pytest.approx((prior(1) * PRIOR_TRIALS + 1) / (PRIOR_TRIALS + 1))


def test_old_trials_fade() -> None:
    acceptance = Acceptance()
    for _ in range(2000):
        acceptance.count([Piece("a", 1, 1)], 0)
    assert acceptance("a", 1) == pytest.approx(prior(1) * PRIOR_TRIALS / (PRIOR_TRIALS + 1 / (1 - FADING)))
    acceptance.fade_all(0.0)
    assert acceptance("a", 1) == prior(1)


def test_a_draft_has_an_estimate_for_each_token() -> None:
    draft = Draft.of([1, 2], "a", 3).then(Draft.of([5], "b", 1))
    assert Acceptance().of(draft) == [0.75, 0.75, 0.4]
