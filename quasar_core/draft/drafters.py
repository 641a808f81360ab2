"""Drafters propose tokens without running the target. They know token ids and nothing of models."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from quasar_core.config import GenerationConfig

_Gram = tuple[int, ...]


@dataclass(frozen=True)
class Draft:
    """Proposed tokens, and the length of the match that they follow (0: none)."""

    tokens: tuple[int, ...] = ()
    match_length: int = 0


class Drafter(Protocol):
    """Follows the text, token by token, and proposes what comes next."""

    def observe(self, tokens: Sequence[int]) -> None:
        """The text goes on with `tokens`."""
        ...

    def forget(self, count: int) -> None:
        """The last `count` tokens are taken back."""
        ...

    def propose(self, limit: int) -> Draft:
        """At most `limit` tokens to follow the text."""
        ...


class NoDrafter:
    """Plain decoding: proposes nothing."""

    def observe(self, tokens: Sequence[int]) -> None:
        """Nothing to remember."""

    def forget(self, count: int) -> None:
        """Nothing to forget."""

    def propose(self, limit: int) -> Draft:
        """The empty draft."""
        return Draft()


class NgramDrafter:
    """Prompt lookup (Saxena, 2023; the paper, §3): proposes what followed the last tokens earlier in the text.

    Matches the longest suffix of `min_size` to `max_size` tokens; of several matches, the most recent.

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

    def propose(self, limit: int) -> Draft:
        """Copy from behind the match; a copy that reaches the end of the text goes on with itself (as in LZ77)."""
        self._index()
        for size in self.sizes:
            start = self._next_position.get(tuple(self.context[-size:])) if size <= len(self.context) else None
            if start is not None and limit > 0:
                period = len(self.context) - start
                return Draft(tuple(self.context[start + i % period] for i in range(limit)), size)
        return Draft()


def make_drafter(config: GenerationConfig) -> Drafter:
    """The drafter that `--draft` names."""
    if config.draft == "none":
        return NoDrafter()
    return NgramDrafter(config.ngram_min, config.ngram_max)
