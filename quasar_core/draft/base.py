"""A drafter proposes tokens without running the target. It knows token ids and nothing of models."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


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
