"""The index of texts against a search of all their places."""

from collections import Counter
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.draft.base import NO_DRAFT, Draft
from quasar_core.draft.suffix import sureness_of
from quasar_core.draft.texts import AROUND, CONTEXT, TextIndex, TextsDrafter, common

RUN = st.lists(st.integers(0, 2), max_size=12)


def longest_matches(texts: Sequence[Sequence[int]], recent: Sequence[int]) -> tuple[int, list[int]]:
    """The longest suffix of the recent tokens that stands before a token of a text, and all such tokens."""
    matches = {0: list[int]()}
    for text in texts:
        for place in range(1, len(text)):
            length = common(text[:place][::-1], recent[::-1][:CONTEXT])
            matches.setdefault(length, []).append(text[place])
    return max(matches), matches[max(matches)]


@given(st.lists(RUN, max_size=4), RUN)
@settings(deadline=None, derandomize=True, max_examples=300)
def test_it_finds_the_longest_match(texts: list[list[int]], recent: list[int]) -> None:
    index = TextIndex.build(texts)
    place, length = index.find(recent)
    expected, following = longest_matches(texts, recent)
    assert length == expected
    if length and len(following) <= AROUND:
        counts = Counter(following)
        assert counts[int(index.ids[place])] == max(counts.values())


def test_a_draft_ends_where_its_text_does_and_a_match_begins_there() -> None:
    drafter = TextsDrafter(TextIndex.build([[1, 2, 3], [3, 4, 5, 6]]))
    drafter.observe([9, 1])
    assert drafter.propose(9).tokens == (2, 3)
    drafter.observe([2, 3])
    assert drafter.propose(9).tokens == (4, 5, 6)
    assert drafter.propose(2, [4]).tokens == (5, 6)
    drafter.forget(2)
    assert drafter.propose(1) == Draft.of([2], "texts", sureness_of(1))
    assert drafter.propose(0) == NO_DRAFT


def test_what_no_text_holds_has_no_draft() -> None:
    drafter = TextsDrafter(TextIndex.build([[1, 2], [], [7]]))
    drafter.observe([7])
    assert drafter.propose(3) == NO_DRAFT
    assert TextIndex.build([]).find([1]) == (0, 0)


def test_contexts_are_told_apart_up_to_their_limit() -> None:
    """Two places whose last 31 tokens are the same."""
    same = [7] * (CONTEXT - 1)
    drafter = TextsDrafter(TextIndex.build([[1, *same, 50], [2, *same, 60]]))
    drafter.observe([1, *same])
    assert drafter.propose(1).tokens == (50,)
    drafter = TextsDrafter(drafter.index)
    drafter.observe([2, *same])
    assert drafter.propose(1).tokens == (60,)


def test_an_index_takes_eight_bytes_a_token() -> None:
    index = TextIndex.build([list(range(1000))])
    assert index.ids.nbytes + index.order.nbytes <= 8 * 1001
