"""A draft: tokens in pieces, cut and joined."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.draft.base import NO_DRAFT, Draft, Drafter, Piece
from quasar_core.records import DrafterUse, Stats, Step

PIECES = st.lists(st.builds(Piece, st.sampled_from("ab"), st.integers(0, 4), st.integers(1, 5)), max_size=5)


def draft_of(pieces: list[Piece]) -> Draft:
    return Draft(tuple(range(sum(piece.length for piece in pieces))), tuple(pieces))


def test_pieces_that_do_not_sum_to_the_tokens_are_a_defect() -> None:
    with pytest.raises(ValueError, match="a draft of 2 tokens"):
        Draft((1, 2), (Piece("ngram", 1, 1),))


def test_a_draft_without_tokens_has_no_piece() -> None:
    assert Draft.of([], "ngram", 3) == NO_DRAFT == Draft()
    assert Draft.of([7], "ngram", 3) == Draft((7,), (Piece("ngram", 3, 1),))


def test_a_cut_may_go_through_a_piece() -> None:
    draft = Draft.of([1, 2, 3], "suffix", 2).then(Draft.of([4, 5], "recycle", 1))
    assert draft.first(4) == Draft((1, 2, 3, 4), (Piece("suffix", 2, 3), Piece("recycle", 1, 1)))
    assert draft.first(2) == Draft.of([1, 2], "suffix", 2)
    assert draft.first(0) == draft.first(-1) == NO_DRAFT
    assert draft.first(9) is draft


@given(PIECES, st.integers(-1, 30))
@settings(deadline=None, derandomize=True)
def test_a_cut_keeps_each_tokens_source(pieces: list[Piece], count: int) -> None:
    draft = draft_of(pieces)
    kept = [(token, piece.source, piece.sureness) for token, piece in draft.first(count).walk()]
    assert kept == [(token, piece.source, piece.sureness) for token, piece in draft.walk()][: max(count, 0)]
    assert draft.first(count).tokens == draft.tokens[: max(count, 0)]


def test_a_drafter_need_not_look_at_passes() -> None:
    class Least(Drafter):
        pass

    assert Least.wants_best == 0
    assert Least().see([1], [[2]], 0) is None


def test_what_each_drafter_did_is_counted_from_the_steps() -> None:
    steps = [
        Step(5, 3, [Piece("a", 1, 2), Piece("b", 2, 2), Piece("a", 1, 1)]),
        Step(2, 0, [Piece("b", 1, 2)]),
        Step(0, 0),
    ]
    stats = Stats(step_log=steps)
    assert stats.drafters == {"a": DrafterUse(1, 3, 2), "b": DrafterUse(2, 4, 1)}
    assert list(stats.drafters) == ["a", "b"]  # the most accepted first
    assert sum(use.accepted for use in stats.drafters.values()) == stats.accepted
    assert sum(use.drafted for use in stats.drafters.values()) == stats.drafted
    stored = json.loads(json.dumps(stats.to_dict(logs=True)))
    assert stored["drafters"]["b"] == {"steps": 2, "drafted": 4, "accepted": 1}
    assert Stats.from_dict(stored) == stats
