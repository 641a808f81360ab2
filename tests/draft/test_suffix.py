"""The suffix drafter and the memory of answers, against a search of the whole text."""

from collections.abc import Sequence

from helpers.token_runs import places, usual
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.draft.automaton import NONE, SuffixAutomaton
from quasar_core.draft.base import NO_DRAFT, Draft, Piece
from quasar_core.draft.memory import MOST_REMEMBERED, MemoryDrafter, remember
from quasar_core.draft.suffix import SuffixDrafter, sureness_of

TEXTS = st.lists(st.integers(0, 3), max_size=25)
EDITS = st.lists(st.tuples(st.lists(st.integers(0, 3), max_size=6), st.integers(0, 8)), max_size=6)


def suffix_over(tokens: Sequence[int]) -> SuffixDrafter:
    drafter = SuffixDrafter()
    drafter.observe(tokens)
    return drafter


def follow_naively(text: Sequence[int], run: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """What usually follows a run of a text, token by token; where nothing does, what follows a shorter run."""
    found: list[tuple[int, int]] = []
    run = list(run)
    while run and len(found) < limit:
        token = usual(text, run)
        if token == NONE:
            run = run[1:]
            continue
        found.append((token, len(run)))
        run.append(token)
    return found


def draft_of(found: Sequence[tuple[int, int]], source: str) -> Draft:
    draft = NO_DRAFT
    for token, length in found:
        draft = draft.then(Draft.of([token], source, sureness_of(length)))
    return draft


def same(one: Draft, other: Draft) -> bool:
    """The same tokens, of the same source and sureness each."""
    return [(t, p.source, p.sureness) for t, p in one.walk()] == [(t, p.source, p.sureness) for t, p in other.walk()]


def longest_repeated(text: Sequence[int], after: Sequence[int] = ()) -> list[int]:
    """The longest suffix of a text and `after` that the text held before its end."""
    whole = [*text, *after]
    for size in range(len(whole), 0, -1):
        run = whole[len(whole) - size :]
        ends = places(text, run)
        if len(ends) > (0 if after else 1):
            return run
    return []


def test_what_follows_most_often_is_proposed_and_of_equal_ones_the_latest() -> None:
    assert suffix_over([1, 2, 5, 1, 2, 5, 1, 2, 6, 1, 2]).propose(1).tokens == (5,)
    assert suffix_over([1, 2, 5, 1, 2, 6, 1, 2]).propose(1).tokens == (6,)


def test_a_draft_becomes_surer_as_it_goes_on() -> None:
    draft = suffix_over([9, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1]).propose(6)
    assert draft.tokens == (2, 3, 4, 5, 6, 7)
    assert draft.pieces == (
        Piece("suffix", 1, 1),
        Piece("suffix", 2, 1),
        Piece("suffix", 3, 1),
        Piece("suffix", 4, 2),
        Piece("suffix", 5, 1),
    )


def test_nothing_is_proposed_without_a_match_or_room() -> None:
    assert suffix_over([]).propose(4) == suffix_over([1, 2, 3]).propose(4) == NO_DRAFT
    assert suffix_over([1, 1]).propose(0) == suffix_over([1, 1]).propose(-1) == NO_DRAFT


@given(TEXTS, st.lists(st.integers(0, 3), max_size=3), st.integers(0, 8))
@settings(deadline=None, derandomize=True, max_examples=150)
def test_it_proposes_what_a_search_finds(text: list[int], after: list[int], limit: int) -> None:
    found = follow_naively(text, longest_repeated(text, after), limit)
    assert same(suffix_over(text).propose(limit, after), draft_of(found, "suffix"))


@given(TEXTS, EDITS)
@settings(deadline=None, derandomize=True, max_examples=100)
def test_what_is_forgotten_leaves_no_trace(text: list[int], edits: list[tuple[list[int], int]]) -> None:
    drafter, kept = suffix_over(text), list(text)
    for added, count in edits:
        drafter.observe(added)
        kept += added
        count = min(count, len(kept))
        drafter.forget(count)
        kept = kept[: len(kept) - count]
        assert drafter.propose(6) == suffix_over(kept).propose(6)


@given(TEXTS, TEXTS, EDITS, st.lists(st.integers(0, 3), max_size=3))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_a_memory_is_searched_for_the_longest_suffix_of_the_text(
    past: list[int], text: list[int], edits: list[tuple[list[int], int]], after: list[int]
) -> None:
    memory = SuffixAutomaton()
    remember(memory, past)
    drafter, kept = MemoryDrafter(memory), list(text)
    drafter.observe(text)
    for added, count in [([], 0), *edits]:
        drafter.observe(added)
        kept += added
        count = min(count, len(kept))
        drafter.forget(count)
        kept = kept[: len(kept) - count]
        whole = [*kept, *after]
        run = next((whole[i:] for i in range(len(whole)) if places(past, whole[i:])), [])
        assert same(drafter.propose(6, after), draft_of(follow_naively(past, run, 6), "memory"))


def test_a_memory_has_an_end() -> None:
    memory = SuffixAutomaton()
    for start in range(3):
        remember(memory, range(start * 30_000, (start + 1) * 30_000))
    assert len(memory.text) == MOST_REMEMBERED // 2
    assert memory.text[-1] == 89_999
