"""Drafts by looking the last few tokens up in the text so far."""

from collections.abc import Sequence

from quasar_core.draft.base import NO_DRAFT, Draft, Drafter

_Gram = tuple[int, ...]


class NgramDrafter(Drafter):
    """Prompt lookup (Saxena, 2023; the paper, §3): proposes what followed the last tokens earlier in the text.

    Matches the longest suffix of `min_size` to `max_size` tokens; of several matches, the most recent. The length of
    the match is how sure the draft is.

    An n-gram enters the index when the token after it is known, so a suffix never matches itself. Every entry keeps
    what it replaced, so tokens can be taken back. All operations take constant time a token.
    """

    def __init__(self, min_size: int = 1, max_size: int = 3) -> None:
        self.sizes = range(max_size, min_size - 1, -1)
        self.context: list[int] = []
        self._next_position: dict[_Gram, int] = {}
        self._replaced: list[list[tuple[_Gram, int | None]]] = []

    def observe(self, tokens: Sequence[int]) -> None:
        """Take note of the new tokens; they are indexed when a draft is asked for, so that following costs nothing."""
        self.context.extend(tokens)

    def forget(self, count: int) -> None:
        """Undo the last `count` observations."""
        del self.context[len(self.context) - count :]
        while len(self._replaced) > len(self.context):
            for gram, previous in self._replaced.pop():
                if previous is None:
                    del self._next_position[gram]
                else:
                    self._next_position[gram] = previous

    def _index(self) -> None:
        """Enter the n-grams that end before each token that is new."""
        for position in range(len(self._replaced), len(self.context)):
            entries = []
            for size in self.sizes:
                if size <= position:
                    gram = tuple(self.context[position - size : position])
                    entries.append((gram, self._next_position.get(gram)))
                    self._next_position[gram] = position
            self._replaced.append(entries)

    def propose(self, limit: int, after: Sequence[int] = ()) -> Draft:
        """Copy from behind the match; a copy that reaches the end of the text goes on with itself (as in LZ77)."""
        self._index()
        ending = (*self.context[-self.sizes.start :], *after)
        for size in self.sizes:
            start = self._next_position.get(ending[-size:]) if size <= len(ending) else None
            if start is not None and limit > 0:
                return Draft.of(self._copy(start, after, limit), "ngram", size)
        return NO_DRAFT

    def _copy(self, start: int, after: Sequence[int], limit: int) -> tuple[int, ...]:
        """`limit` tokens from `start` of the text and `after`, again and again."""
        known = len(self.context)
        period = known + len(after) - start
        places = (start + i % period for i in range(limit))
        return tuple(self.context[place] if place < known else after[place - known] for place in places)
