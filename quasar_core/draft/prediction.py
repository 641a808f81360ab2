"""Drafts from the text that the user expects."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from quasar_core.draft.base import Draft, Drafter
from quasar_core.draft.suffix import matched_draft

SIZES = (8, 4, 2)  # tokens that a place is found again by, the longest first
TRUST = 4  # the match that the beginning counts as

_Place = tuple[int, int]  # where the expected text goes on, and how many tokens before it were met


class PredictionDrafter(Drafter):
    """Follows an expected text for as long as the answer does; where they part, finds the place to go on from.

    As the predicted outputs of OpenAI's interface (2024). The answer is expected to begin as the text does. At a token
    that differs, the last tokens of the answer are looked for in the text: the longest run first, of equal ones the
    nearest. Where none is found, one token is taken to stand for another, and the draft goes on behind it. A token's
    sureness is the number of tokens that were met before it. All operations take constant time a token, but for runs
    that the expected text repeats, whose places are searched by halving; it keeps three lists of places a token.
    """

    def __init__(self, expected: Sequence[int]) -> None:
        self.expected = tuple(expected)
        self._answer: list[int] | None = None  # None before the prompt was seen
        self._places: list[_Place] = [(0, TRUST)]  # after each token of the answer
        self._ends: dict[tuple[int, ...], list[int]] = {}
        for size in SIZES:
            for end in range(size, len(self.expected) + 1):
                self._ends.setdefault(self.expected[end - size : end], []).append(end)

    def observe(self, tokens: Sequence[int]) -> None:
        """Follow the answer through the expected text; what comes first is the prompt."""
        if self._answer is None:
            self._answer = []
            return
        for place in self._walk(self._places[-1], self._answer, tokens):
            self._places.append(place)
        self._answer += tokens

    def forget(self, count: int) -> None:
        """Go back to the place before the last `count` tokens."""
        if self._answer:
            del self._answer[len(self._answer) - count :]
            del self._places[len(self._answer) + 1 :]

    def propose(self, limit: int, after: Sequence[int] = ()) -> Draft:
        """The expected text from the place that was reached."""
        place, met = [self._places[-1], *self._walk(self._places[-1], self._answer or [], after)][-1]
        ahead = self.expected[place : place + max(limit, 0)]
        return matched_draft(((token, met + i) for i, token in enumerate(ahead)), "prediction")

    def _walk(self, place: _Place, answer: Sequence[int], tokens: Sequence[int]) -> Iterator[_Place]:
        """The place after each of some tokens that follow an answer."""
        recent = list(answer[-SIZES[0] :])
        for token in tokens:
            recent.append(token)
            place = self._next(place, recent)
            yield place

    def _next(self, place: _Place, recent: Sequence[int]) -> _Place:
        """The place after the last of the recent tokens, from that before it."""
        at, met = place
        if self.expected[at : at + 1] == (recent[-1],):
            return at + 1, met + 1
        for size in SIZES:
            if len(recent) >= size and (ends := self._ends.get(tuple(recent[-size:]))):
                return nearest(ends, at), size
        return min(at + 1, len(self.expected)), 0


def nearest(ends: Sequence[int], place: int) -> int:
    """The end nearest to a place, of equal ones the later; `ends` ascend."""
    behind = bisect_left(ends, place)
    if behind == 0 or (behind < len(ends) and ends[behind] - place <= place - ends[behind - 1]):
        return ends[behind]
    return ends[behind - 1]
