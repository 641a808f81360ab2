"""Drafts of a cheaper model: token by token, as long as they are likely enough to be accepted."""

from bisect import bisect
from collections.abc import Sequence
from itertools import groupby
from math import inf
from typing import Protocol

from quasar_core.draft.acceptance import Acceptance
from quasar_core.draft.base import NO_DRAFT, Draft, Drafter, Piece

USUAL = 0.7  # of drafted tokens are right, before any was tried
LEARNING, FORGETTING = 0.05, 0.01
MARGINS = (0.5, 1.5, 3.5)  # nats between the two best logits: the more of them a token exceeds, the surer it is


class Guesser(Protocol):
    """A cheaper model over a cache of its own."""

    ratio: float  # what its pass of one token costs, in passes of the model that it drafts for

    def follow(self, text: Sequence[int], common: int) -> tuple[int, float]:
        """The token that it would write behind `text`, and its margin; −1 for none.

        The first `common` tokens are those of the call before.
        """
        ...


class NoGuesser:
    """Where no cheaper model pays: it is never asked."""

    ratio = inf

    def follow(self, text: Sequence[int], common: int) -> tuple[int, float]:
        """See `Guesser`."""
        return -1, 0.0


class ModelDrafter(Drafter):
    """Speculative decoding with a draft model (Leviathan et al., 2023): its greedy text is the draft.

    A further token is worth its pass where it and all drafted ones are right with a probability above the pass's cost,
    in passes of the model that is drafted for; else drafting ends. How sure a token is follows from its margin; how
    often tokens as sure are right, and tokens as a whole, is learned from the text. What is not drafted is forgotten
    slowly, so that it is tried again.
    """

    def __init__(self, source: str, guesser: Guesser) -> None:
        self.source, self._guesser = source, guesser
        self._text: list[int] = []
        self._common = 0  # tokens of the text, from its beginning, that the guesser has followed
        self._acceptance = Acceptance()
        self._usual = USUAL  # how often a drafted token is right, lately
        self._open: list[tuple[int, int]] = []  # of the last draft, what the text has not reached: token and sureness

    def observe(self, tokens: Sequence[int]) -> None:
        """Compare the last draft with what the text became."""
        for token in tokens:
            if self._open:
                drafted, sureness = self._open.pop(0)
                self._acceptance.count([Piece(self.source, sureness, 1)], int(drafted == token))
                self._usual += LEARNING * ((drafted == token) - self._usual)
                if drafted != token:
                    self._open.clear()
        self._text += tokens

    def forget(self, count: int) -> None:
        """Take back the last tokens; the guesser follows anew from there."""
        del self._text[len(self._text) - count :]
        self._common = min(self._common, len(self._text))
        if count:
            self._open.clear()

    def propose(self, limit: int, after: Sequence[int] = ()) -> Draft:
        """Draft until a token more is not worth its pass."""
        found: list[tuple[int, int]] = []  # token and sureness
        text, alive = [*self._text, *after], 1.0
        while len(found) < limit and alive * self._usual >= self._guesser.ratio:
            token, margin = self._guesser.follow(text, self._common)
            self._common = len(text)
            if token < 0:
                break
            found.append((token, bisect(MARGINS, margin)))
            text.append(token)
            alive *= self._acceptance(self.source, found[-1][1])
        if not found:
            self._usual += FORGETTING * (USUAL - self._usual)
        self._common = len(self._text)
        self._open = [] if after else list(found)
        return _draft(found, self.source)


def _draft(found: Sequence[tuple[int, int]], source: str) -> Draft:
    """A draft of tokens with their sureness; neighbours of the same are one piece."""
    if not found:
        return NO_DRAFT
    runs = [(sureness, len(list(some))) for sureness, some in groupby(sureness for _, sureness in found)]
    return Draft(tuple(token for token, _ in found), tuple(Piece(source, *run) for run in runs))
