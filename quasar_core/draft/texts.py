"""Drafts from texts that the user names: an array of their places, sorted by what stands before."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from quasar_core.draft.base import NO_DRAFT, Draft, TextFollower
from quasar_core.draft.suffix import matched_draft

CONTEXT = 32  # tokens before a place by which it is found
AROUND = 8  # places to both sides of the best, that are asked what follows
BREAK = -1  # stands between texts, and is no token

Ids = NDArray[np.int32]


class TextIndex:
    """All places of some texts, sorted by the tokens before them, read backwards: a suffix array of the reversed text.

    The places whose past is most like a given one are neighbours of where that would be sorted in, so one binary search
    finds the longest match. Eight bytes a token, where an automaton takes some hundred (Manber and Myers, 1993, for the
    array; REST, He et al., 2023, drafts from one).
    """

    def __init__(self, ids: Ids, order: Ids) -> None:
        self.ids, self.order = ids, order

    @classmethod
    def build(cls, texts: Sequence[Sequence[int]]) -> "TextIndex":
        """Sort the places by doubling: by one token before them, by two, by four, …, by CONTEXT."""
        joined = [token for text in texts for token in (*text, BREAK)]
        ids = np.array(joined, dtype=np.int32)
        rank, known = np.unique(ids, return_inverse=True)[1].astype(np.int64), 1
        while known < CONTEXT and len(ids):
            before = np.zeros_like(rank)
            before[known:] = rank[:-known] + 1
            rank = np.unique(rank * (len(ids) + 1) + before, return_inverse=True)[1].astype(np.int64)
            known *= 2
        followed = np.flatnonzero((ids[:-1] != BREAK) & (ids[1:] != BREAK))
        order = followed[np.argsort(rank[followed], kind="stable")]
        return cls(ids, order.astype(np.int32))

    def find(self, recent: Sequence[int]) -> tuple[int, int]:
        """Where to go on after the recent tokens: a place, and how many tokens before it match; (0, 0) for none.

        Of the places that match best, one that is followed by what follows most of them.
        """
        wanted = list(recent[: -CONTEXT - 1 : -1])
        at = bisect_left(self.order, wanted, key=self._past)
        near = [int(last) for last in self.order[max(at - AROUND, 0) : at + AROUND]]
        matches = {last + 1: common(self._past(last), wanted) for last in near}
        longest = max(matches.values(), default=0)
        if not longest:
            return 0, 0
        places = [place for place, length in matches.items() if length == longest]
        usual = Counter(int(self.ids[place]) for place in places).most_common(1)[0][0]
        return max(place for place in places if self.ids[place] == usual), longest

    def after(self, place: int, limit: int) -> list[int]:
        """At most `limit` tokens from a place on, to the end of its text."""
        ahead: list[int] = self.ids[place : place + limit].tolist()
        return ahead[: ahead.index(BREAK)] if BREAK in ahead else ahead

    def _past(self, last: int) -> list[int]:
        """The tokens up to a place, backwards."""
        past: list[int] = self.ids[max(last + 1 - CONTEXT, 0) : last + 1][::-1].tolist()
        return past


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two runs begin with alike."""
    for length, (own, others) in enumerate(zip(one, other, strict=False)):
        if own != others:
            return length
    return min(len(one), len(other))


class TextsDrafter(TextFollower):
    """Finds the longest suffix of the text in an index, and proposes what follows it there."""

    def __init__(self, index: TextIndex) -> None:
        self.index = index
        super().__init__()

    def propose(self, limit: int, after: Sequence[int] = ()) -> Draft:
        """What stands behind the longest match."""
        if limit <= 0:
            return NO_DRAFT
        place, length = self.index.find([*self._text[-CONTEXT:], *after])
        ahead = self.index.after(place, limit) if length else []
        return matched_draft(((token, length + i) for i, token in enumerate(ahead)), "texts")
