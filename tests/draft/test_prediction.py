"""The text that is expected: followed, left, and found again."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.draft.base import NO_DRAFT
from quasar_core.draft.prediction import PredictionDrafter, nearest
from quasar_core.records import Piece

EXPECTED = list(range(100, 140))


def drafter_after(answer: list[int], expected: list[int] = EXPECTED) -> PredictionDrafter:
    drafter = PredictionDrafter(expected)
    drafter.observe([1, 2, 3])
    drafter.observe(answer)
    return drafter


def test_an_answer_is_expected_to_begin_as_the_text() -> None:
    assert drafter_after([]).propose(3).tokens == (100, 101, 102)
    assert drafter_after([]).propose(0) == NO_DRAFT


def test_the_prompt_is_no_part_of_the_answer() -> None:
    drafter = PredictionDrafter(EXPECTED)
    drafter.observe(EXPECTED[:20])
    assert drafter.propose(2).tokens == (100, 101)


def test_it_is_followed_as_long_as_it_holds() -> None:
    assert drafter_after(EXPECTED[:10]).propose(3).tokens == (110, 111, 112)
    assert drafter_after(EXPECTED).propose(3) == NO_DRAFT
    assert drafter_after([]).propose(2, EXPECTED[:4]).tokens == (104, 105)


def test_tokens_that_were_met_add_to_the_beginning() -> None:
    """So a place that was never lost is surer than one that two tokens were found again by."""
    assert drafter_after(EXPECTED[:2]).propose(3).pieces == (Piece("prediction", 5, 3),)
    assert drafter_after([7, 8, 100, 101]).propose(1).pieces[0].sureness == 2


def test_one_token_for_another_is_stepped_over() -> None:
    draft = drafter_after([100, 101, 7]).propose(2)
    assert draft.tokens == (103, 104)
    assert draft.pieces[0].sureness == 1  # not sure


def test_after_an_insertion_and_after_a_deletion_the_place_is_found_again() -> None:
    assert drafter_after([100, 101, 7, 8, 9, 102, 103]).propose(2).tokens == (104, 105)
    assert drafter_after([100, 101, 120, 121]).propose(2).tokens == (122, 123)


def test_of_equal_places_the_nearest_is_taken() -> None:
    expected = [5, 6, 1, 2, 3, 9, 5, 6, 4, 4, 4, 4, 5, 6, 7]
    assert drafter_after([5, 6, 1, 2, 0, 5, 6], expected).propose(1).tokens == (4,)
    assert nearest([2, 8, 14], 8) == 8
    assert nearest([2, 8, 14], 5) == 8
    assert nearest([2, 8, 14], 4) == 2
    assert nearest([2, 8, 14], 99) == 14


@given(st.lists(st.integers(0, 5), max_size=20), st.lists(st.tuples(st.lists(st.integers(0, 5)), st.integers(0, 9))))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_what_is_forgotten_leaves_no_trace(expected: list[int], edits: list[tuple[list[int], int]]) -> None:
    drafter, kept = drafter_after([], expected), list[int]()
    for added, count in edits:
        drafter.observe(added)
        kept += added
        count = min(count, len(kept))
        drafter.forget(count)
        kept = kept[: len(kept) - count]
        assert vars(drafter) == vars(drafter_after(kept, expected))


@given(st.lists(st.integers(0, 5), max_size=20), st.lists(st.integers(0, 5)), st.lists(st.integers(0, 5), max_size=4))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_what_comes_after_is_followed_as_text_is(expected: list[int], text: list[int], after: list[int]) -> None:
    assert drafter_after(text, expected).propose(5, after) == drafter_after([*text, *after], expected).propose(5)


def test_an_edited_text_is_followed_through_every_edit() -> None:
    """Of 600 tokens with an edit in every 30, nearly all are proposed at the right place."""
    dice = random.Random(0)
    expected = [dice.randrange(50) for _ in range(600)]
    answer = list(expected)
    for place in range(570, 0, -30):
        edit = dice.choice(["replace", "insert", "delete"])
        if edit == "delete":
            del answer[place : place + dice.randrange(1, 5)]
        else:
            new = [dice.randrange(50, 60) for _ in range(dice.randrange(1, 5))]
            answer[place : place + (len(new) if edit == "replace" else 0)] = new
    drafter, right = drafter_after([], expected), 0
    for token in answer:
        right += drafter.propose(1).tokens == (token,)
        drafter.observe([token])
    assert right > 0.8 * len(answer)
