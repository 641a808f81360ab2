"""The n-gram drafter: which match it takes, what it copies, and that every observation can be taken back."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.draft.base import NO_DRAFT, Draft
from quasar_core.draft.ngram import NgramDrafter
from quasar_core.draft.none import NoDrafter

TEXTS = st.lists(st.integers(0, 3), max_size=40)


def drafter_over(tokens: Sequence[int], smallest: int = 1, largest: int = 3) -> NgramDrafter:
    drafter = NgramDrafter(smallest, largest)
    drafter.observe(tokens)
    return drafter


def search_naively(text: Sequence[int], limit: int, smallest: int, largest: int) -> Draft:
    """Every earlier place of every suffix, longest first, then latest; the copied text grows by what it copies."""
    for size in range(largest, smallest - 1, -1):
        for start in range(len(text) - size - 1, -1, -1):
            if limit > 0 and list(text[start : start + size]) == list(text[len(text) - size :]):
                grown = list(text)
                for i in range(limit):
                    grown.append(grown[start + size + i])
                return Draft.of(grown[len(text) :], "ngram", size)
    return NO_DRAFT


def test_the_longest_match_wins_over_a_later_one() -> None:
    # 1 2 3 stood at the beginning; 3 alone stood later, before a 9
    assert drafter_over([1, 2, 3, 7, 8, 3, 9, 1, 2, 3]).propose(2) == Draft.of((7, 8), "ngram", 3)


def test_of_equal_matches_the_most_recent_wins() -> None:
    assert drafter_over([1, 2, 5, 1, 2, 6, 1, 2]).propose(1) == Draft.of((6,), "ngram", 2)


def test_a_copy_that_reaches_the_end_goes_on_with_itself() -> None:
    assert drafter_over([4, 1, 2, 1, 2]).propose(5) == Draft.of((1, 2, 1, 2, 1), "ngram", 2)
    assert drafter_over([7, 7]).propose(3) == Draft.of((7, 7, 7), "ngram", 1)


def test_nothing_is_proposed_without_a_match_or_room() -> None:
    assert drafter_over([]).propose(4) == NO_DRAFT
    assert drafter_over([1, 2, 3]).propose(4) == NO_DRAFT
    assert drafter_over([1, 1]).propose(0) == NO_DRAFT
    assert drafter_over([1, 1]).propose(-1) == NO_DRAFT


def test_sizes_bound_the_match() -> None:
    text = [1, 2, 3, 4, 9, 1, 2, 3, 4]
    assert drafter_over(text, 1, 2).propose(1).pieces[0].sureness == 2
    assert drafter_over(text, 1, 4).propose(1).pieces[0].sureness == 4
    assert drafter_over([3, 5, 4, 5], 2, 3).propose(1) == NO_DRAFT


@given(TEXTS, st.integers(0, 8), st.integers(1, 2), st.integers(0, 2))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_it_proposes_what_a_naive_search_finds(text: list[int], limit: int, smallest: int, more: int) -> None:
    found = search_naively(text, limit, smallest, smallest + more)
    assert drafter_over(text, smallest, smallest + more).propose(limit) == found


@given(TEXTS, st.lists(st.tuples(st.lists(st.integers(0, 3), max_size=6), st.integers(0, 8)), max_size=6))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_what_is_forgotten_leaves_no_trace(text: list[int], edits: list[tuple[list[int], int]]) -> None:
    drafter, kept = drafter_over(text), list(text)
    for added, count in edits:
        drafter.observe(added)
        kept += added
        count = min(count, len(kept))
        drafter.forget(count)
        kept = kept[: len(kept) - count]
        assert drafter.propose(6) == search_naively(kept, 6, 1, 3)
    drafter.forget(len(kept))
    assert vars(drafter) == vars(NgramDrafter())


def test_no_drafter_proposes_nothing() -> None:
    drafter = NoDrafter()
    drafter.observe([1, 1, 1])
    drafter.forget(1)
    assert drafter.propose(5) == NO_DRAFT
