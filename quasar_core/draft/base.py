"""What every drafter is, and what a draft is: token ids, in pieces that say where they come from and how sure they are.

Drafters propose tokens without running the target. They know token ids and nothing of models.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from quasar_core.records import Piece

__all__ = ["NO_DRAFT", "Draft", "Drafter", "Piece"]


@dataclass(frozen=True)
class Draft:
    """Proposed tokens, and the pieces that they are made of, in order; the pieces' lengths sum to the tokens."""

    tokens: tuple[int, ...] = ()
    pieces: tuple[Piece, ...] = ()

    def __post_init__(self) -> None:
        if sum(piece.length for piece in self.pieces) != len(self.tokens):
            raise ValueError(f"a draft of {len(self.tokens)} tokens has pieces of {self.pieces}")

    @classmethod
    def of(cls, tokens: Sequence[int], source: str, sureness: int) -> "Draft":
        """A draft of one piece; without tokens, of none."""
        return cls(tuple(tokens), (Piece(source, sureness, len(tokens)),)) if tokens else NO_DRAFT

    def walk(self) -> Iterator[tuple[int, Piece]]:
        """Each token with the piece that it belongs to."""
        tokens = iter(self.tokens)
        for piece in self.pieces:
            for _ in range(piece.length):
                yield next(tokens), piece

    def first(self, count: int) -> "Draft":
        """The first `count` tokens; a piece that goes beyond them is cut."""
        if count >= len(self.tokens):
            return self
        return Draft(self.tokens[: max(count, 0)], first_pieces(self.pieces, count))

    def then(self, other: "Draft") -> "Draft":
        """This draft, and another behind it."""
        return Draft(self.tokens + other.tokens, self.pieces + other.pieces)


NO_DRAFT = Draft()


def first_pieces(pieces: Sequence[Piece], count: int) -> tuple[Piece, ...]:
    """The pieces of the first `count` tokens."""
    kept = []
    for piece in pieces:
        if count <= 0:
            break
        kept.append(Piece(piece.source, piece.sureness, min(piece.length, count)))
        count -= piece.length
    return tuple(kept)


def pieces_behind(pieces: Sequence[Piece], count: int) -> tuple[Piece, ...]:
    """The pieces of all but the first `count` tokens."""
    left = []
    for piece in pieces:
        if piece.length > count:
            left.append(Piece(piece.source, piece.sureness, piece.length - max(count, 0)))
        count -= piece.length
    return tuple(left)


class Drafter(Protocol):
    """Follows the text, token by token, and proposes what comes next. A class that inherits from it has the defaults.

    `wants_best` is how many of the likeliest successors of each token `see` is to be told; with 0 it is never called.
    """

    wants_best: int = 0

    def observe(self, tokens: Sequence[int]) -> None:
        """The text goes on with `tokens`; the first call brings the prompt."""
        ...

    def forget(self, count: int) -> None:
        """The last `count` tokens are taken back."""
        ...

    def propose(self, limit: int, after: Sequence[int] = ()) -> Draft:
        """At most `limit` tokens to follow the text and `after`, which is another's draft and not part of the text."""
        ...

    def alternatives(self, draft: Sequence[int]) -> list[list[int]]:
        """What is likely behind the text, behind the first token of a draft, …, behind its last: tokens, best first.

        The draft's own may be among them; −1 stands for none.
        """
        return []

    def see(self, tokens: Sequence[int], best: Sequence[Sequence[int]], start: int) -> None:
        """A pass ran over `tokens`: `best[i]` are the likeliest successors that it found of `tokens[i]`, best first.

        The first of them is the text's token at `start`. Those of a draft that was refused are among them. Called
        before the new text is observed, and before refused text is taken back.
        """
        return  # nothing to learn from it


class TextFollower(Drafter):
    """A drafter that keeps the text, as it goes on and is taken back, and does nothing else with it then."""

    def __init__(self) -> None:
        self._text: list[int] = []

    def observe(self, tokens: Sequence[int]) -> None:
        """The text goes on."""
        self._text += tokens

    def forget(self, count: int) -> None:
        """The text ends earlier."""
        del self._text[len(self._text) - count :]
