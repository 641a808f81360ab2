"""Drafts by the longest run of tokens that the text has held before."""

from bisect import bisect
from collections.abc import Iterable, Sequence
from itertools import groupby

from quasar_core.draft.automaton import SuffixAutomaton
from quasar_core.draft.base import NO_DRAFT, Draft, Drafter, Piece

CLASSES = (2, 3, 4, 6, 9)  # lengths of a match from which a token is one class surer; 1 is the least


def sureness_of(length: int) -> int:
    """The class of a token that follows a match of so many tokens."""
    return bisect(CLASSES, length) + 1


def matched_draft(followed: Iterable[tuple[int, int]], source: str) -> Draft:
    """A draft of tokens that each come with the length of the match before them, which grows from token to token."""
    tokens, sure = [], []
    for token, length in followed:
        tokens.append(token)
        sure.append(sureness_of(length))
    pieces = tuple(Piece(source, sureness, len(list(run))) for sureness, run in groupby(sure))
    return Draft(tuple(tokens), pieces) if tokens else NO_DRAFT


class SuffixDrafter(Drafter):
    """Finds the longest suffix of the text that occurred before, and proposes what usually followed it.

    After SAM-Decoding (Hu et al., 2024), whose automaton finds the longest match in constant time, and SuffixDecoding
    (Oliaro et al., 2024), which follows the most frequent token. A token's sureness is the length of the match that it
    follows, those drafted before it included: the further a draft has held, the surer it is.

    Memory and time: `docs/drafters.md`. A token is indexed when a draft is asked for.
    """

    def __init__(self) -> None:
        self.automaton = SuffixAutomaton()
        self._unread: list[int] = []

    def observe(self, tokens: Sequence[int]) -> None:
        """Take note of the new tokens."""
        self._unread.extend(tokens)

    def forget(self, count: int) -> None:
        """Undo the last `count` observations."""
        unread = min(count, len(self._unread))
        del self._unread[len(self._unread) - unread :]
        self.automaton.forget(count - unread)

    def propose(self, limit: int, after: Sequence[int] = ()) -> Draft:
        """What usually followed the longest suffix of the text and `after`."""
        self.automaton.extend(self._unread)
        self._unread.clear()
        state, length = self.automaton.repeated
        for token in after:
            state, length = self.automaton.step(state, length, token)
        return matched_draft(self.automaton.follow(state, length, limit), "suffix")
