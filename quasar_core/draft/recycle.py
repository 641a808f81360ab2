"""Drafts from logits that passes have computed anyway: the likeliest successors of every token that was passed."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quasar_core.draft.base import NO_DRAFT, Draft, Piece, TextFollower

SOURCE = "recycle"
WIDTH = 8  # successors of a row
CONTEXTS = (3, 2, 1)  # tokens that a row is remembered by, the longest first
SLOTS = 1 << 17


class Successors:
    """The rows of the latest passes, [SLOTS, WIDTH] tokens each, by the hash of the last one, two and three tokens.

    A row takes the place of the one that lay in its slot: memory is bounded by 5 MiB, of which only what was written
    is taken up. It holds what a model computed and no text, so nothing in it need ever be undone.
    """

    def __init__(self, slots: int = SLOTS, width: int = WIDTH) -> None:
        self.width = width
        self._keys: NDArray[np.int64] = np.zeros(slots, np.int64)  # 0: nothing there
        self._rows: NDArray[np.int32] = np.zeros((slots, width), np.int32)

    def learn(self, before: Sequence[int], tokens: Sequence[int], rows: Sequence[Sequence[int]]) -> None:
        """`rows[i]` are the successors of `tokens[i]`, the likeliest first; `before` is the text before the tokens.

        A row without a likeliest token (−1) is left out.
        """
        text = [*before[-max(CONTEXTS) + 1 :], *tokens]
        keys, sources = list[int](), list[int]()
        for i, row in enumerate(rows):
            end = len(text) - len(tokens) + i + 1
            known = [size for size in CONTEXTS if size <= end and row[0] >= 0]
            keys += [_key(text[end - size : end]) for size in known]
            sources += [i] * len(known)
        places = np.array(keys, np.int64) % len(self._keys)
        self._keys[places] = keys
        self._rows[places] = np.array(rows, np.int32)[sources]

    def after(self, text: Sequence[int]) -> tuple[int, list[int]]:
        """How many of the last tokens of `text` a row is known for, at most three, and the row; 0 and none without."""
        for size in CONTEXTS:
            if size <= len(text):
                key = _key(text[len(text) - size :])
                place = key % len(self._keys)
                if self._keys[place] == key:
                    return size, self._rows[place].tolist()
        return 0, []


def _key(tokens: Sequence[int]) -> int:
    return hash(tuple(tokens)) or 1


class RecycleDrafter(TextFollower):
    """Token Recycling (Luo et al., 2024, §3): follows the likeliest successors from token to token.

    The paper keeps a row of successors for each token; here the two tokens before it count too where they are known,
    and the number of tokens that counted (less one) is how sure a token is. A row is that of the last pass which ran
    over the token, the target's or the verifier's: a confirm comes after the verifying passes that it checks, so of
    committed text it is the target's. With `successors` that earlier texts have filled it drafts from the first token.
    Both following and proposing take some microseconds a token.
    """

    def __init__(self, successors: Successors | None = None) -> None:
        self.successors = successors or Successors()
        self.wants_best = self.successors.width
        super().__init__()

    def see(self, tokens: Sequence[int], best: Sequence[Sequence[int]], start: int) -> None:
        """Remember the rows of a pass over `tokens`, the first of which stands at `start`."""
        self.successors.learn(self._text[max(start - max(CONTEXTS), 0) : start], tokens, best)

    def alternatives(self, draft: Sequence[int]) -> list[list[int]]:
        """The rows along a draft, whoever made it."""
        text = [*self._text[-max(CONTEXTS) :], *draft]
        return [self.successors.after(text[: len(text) - left])[1] for left in range(len(draft), -1, -1)]

    def propose(self, limit: int, after: Sequence[int] = ()) -> Draft:
        """The likeliest successor, its likeliest successor, and so on, until a token's are not known."""
        text = [*self._text[-max(CONTEXTS) :], *after]
        found: list[tuple[int, int]] = []  # a token, and the tokens that it was found by
        while len(found) < limit:
            size, row = self.successors.after(text)
            if not size:
                break
            found.append((row[0], size))
            text.append(row[0])
        return _draft(found)


def _draft(found: Sequence[tuple[int, int]]) -> Draft:
    """A draft of tokens, each with the length of the context that it was found by."""
    if not found:
        return NO_DRAFT
    pieces: list[Any] = [(size, len(list(some))) for size, some in groupby(size for _, size in found)]
    return Draft(tuple(token for token, _ in found), tuple(Piece(SOURCE, size - 1, length) for size, length in pieces))
