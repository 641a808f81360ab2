"""Recycled drafts against a table without bounds, kept by hand."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.draft.base import Draft, Piece
from quasar_core.draft.recycle import RecycleDrafter, Successors

TOKENS = st.integers(0, 5)
ROW = st.lists(TOKENS, min_size=2, max_size=2, unique=True)
PASS = st.lists(st.tuples(TOKENS, ROW), min_size=1, max_size=4)


class Oracle:
    """Every context of up to three tokens that a pass ran over, and the last row behind it."""

    def __init__(self) -> None:
        self.text: list[int] = []
        self.rows: dict[tuple[int, ...], list[int]] = {}

    def see(self, tokens: Sequence[int], best: Sequence[list[int]], start: int) -> None:
        whole = [*self.text[:start], *tokens]
        for i, row in enumerate(best):
            end = start + i + 1
            for size in range(1, 4):
                if size <= end:
                    self.rows[tuple(whole[end - size : end])] = row

    def propose(self, limit: int, after: Sequence[int]) -> tuple[list[int], list[int]]:
        whole, found, sure = [*self.text, *after], [], []
        for _ in range(limit):
            known = [size for size in (3, 2, 1) if size <= len(whole) and tuple(whole[-size:]) in self.rows]
            if not known:
                break
            whole.append(self.rows[tuple(whole[-known[0] :])][0])
            found.append(whole[-1])
            sure.append(known[0] - 1)
        return found, sure


@given(
    prompt=st.lists(TOKENS, min_size=1, max_size=5),
    steps=st.lists(
        st.tuples(PASS, st.integers(0, 3), st.integers(0, 3), st.lists(TOKENS, max_size=2)), min_size=1, max_size=6
    ),
)
@settings(deadline=None, derandomize=True, max_examples=150)
def test_drafts_are_those_of_a_table_by_hand(prompt: list[int], steps: list[tuple]) -> None:  # type: ignore[type-arg]
    """Passes begin with the text's last token; some of their tokens join the text, some of the text is taken back."""
    drafter, oracle = RecycleDrafter(Successors(width=2)), Oracle()
    drafter.observe(prompt)
    oracle.text += prompt
    for ran, kept, taken, after in steps:
        tokens, rows = [oracle.text[-1], *(token for token, _ in ran[1:])], [row for _, row in ran]
        for one in (drafter, oracle):
            one.see(tokens, rows, len(oracle.text) - 1)  # type: ignore[attr-defined]
        new = [*tokens[1 : 1 + kept], rows[-1][0]]
        drafter.observe(new)
        oracle.text += new
        taken = min(taken, len(oracle.text) - 1)
        drafter.forget(taken)
        del oracle.text[len(oracle.text) - taken :]
        draft = drafter.propose(6, after)
        found, sure = oracle.propose(6, after)
        assert list(draft.tokens) == found
        assert [piece.sureness for _, piece in draft.walk()] == sure


def test_a_chain_says_how_much_of_its_context_was_known() -> None:
    drafter = RecycleDrafter(Successors(width=2))
    drafter.observe([1, 2, 3])
    drafter.see([3], [[4, 9]], 2)
    drafter.see([4], [[5, 9]], 0)  # of another text
    assert drafter.propose(5) == Draft((4, 5), (Piece("recycle", 2, 1), Piece("recycle", 0, 1)))
    assert drafter.propose(1).tokens == (4,)
    assert drafter.propose(5, [7]).tokens == ()


def test_what_was_computed_outlives_the_text() -> None:
    successors = Successors(width=2)
    first, second = RecycleDrafter(successors), RecycleDrafter(successors)
    first.observe([1, 2])
    first.see([2], [[3, 4]], 1)
    first.forget(2)
    second.observe([8, 2])
    assert second.propose(3).tokens == (3,)


def test_a_row_without_a_choice_is_left_out() -> None:
    drafter = RecycleDrafter(Successors(width=2))
    drafter.observe([1])
    drafter.see([1], [[-1, -1]], 0)
    assert drafter.propose(3).tokens == ()


@pytest.mark.parametrize("slots", [1, 7])
def test_a_full_table_forgets_but_never_confuses(slots: int) -> None:
    successors = Successors(slots, width=1)
    for token in range(50):
        successors.learn([], [token], [[token + 100]])
    found = {token: successors.after([token])[1] for token in range(50)}
    assert sum(bool(row) for row in found.values()) <= slots
    assert all(row in ([], [token + 100]) for token, row in found.items())
    assert successors.after([49])[1] == [149]
