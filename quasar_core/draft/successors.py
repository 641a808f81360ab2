"""The likeliest successors of the last few tokens: counted once over a long text of the model, then looked up.

Token Recycling (Luo et al., 2024) keeps the likeliest successors that a session's passes find, and begins with none;
these are those of the text that a model was quantized on, by one, two and three tokens, with their mean probabilities.
Letters: N texts of L tokens, K likeliest tokens of a row, n contexts.
"""

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from quasar_core.draft.base import Draft, Piece, TextFollower

SOURCE = "successors"
LONGEST = 3  # tokens of a context
WIDTH = 8  # successors of a context
MOST_CONTEXTS = 1 << 16  # of 48 bytes each: 3 MiB
_BITS = 21  # of a token in a key; a larger vocabulary has no successors
MOST_TOKENS = (1 << _BITS) - 1
ODDS = 255  # what stands for a probability of 1
CLASSES = (26, 51, 77, 115, 153, 191, 230)  # odds from which on a token is one class surer; the least is 0
SHORTEST_ODDS = 0.02  # of a chain that is this unlikely to hold to its end, more would be read by nobody


def width_of(vocabulary: int) -> int:
    """How many of a row's likeliest tokens count; none of a vocabulary too large for the keys of contexts."""
    return min(WIDTH, vocabulary) if vocabulary <= MOST_TOKENS else 0


@dataclass(frozen=True)
class KnownSuccessors:
    """The likeliest successors of contexts of one to three tokens, and their probabilities in 255ths.

    Contexts are numbers, ascending, [n] int64: 21 bits a token, each token one more than its id, so that none is 0.
    A row of `tokens` [n, 8] int32 holds ids, the likeliest first, −1 where there are fewer; `odds` [n, 8] uint8.
    """

    contexts: NDArray[np.int64]
    tokens: NDArray[np.int32]
    odds: NDArray[np.uint8]
    _places: dict[int, int] = field(init=False, repr=False, compare=False)
    _best: list[int] = field(init=False, repr=False, compare=False)  # the likeliest of each context, and its odds
    _best_odds: list[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_places", dict(zip(self.contexts.tolist(), range(len(self.contexts)), strict=True)))
        object.__setattr__(self, "_best", self.tokens[:, 0].tolist())
        object.__setattr__(self, "_best_odds", self.odds[:, 0].tolist())

    def __len__(self) -> int:
        return len(self.contexts)

    def after(self, text: Sequence[int], longest: int = LONGEST) -> tuple[int, list[int], list[int]]:
        """How many of the last tokens are known as a context, at most `longest`; its successors and their odds.

        0 and none where not even the last token is known.
        """
        size, place = self._find(text, longest)
        return (size, self.tokens[place].tolist(), self.odds[place].tolist()) if size else (0, [], [])

    def best_after(self, text: Sequence[int]) -> tuple[int, int]:
        """The likeliest successor and its odds; −1 where not even the last token is known."""
        size, place = self._find(text, LONGEST)
        return (self._best[place], self._best_odds[place]) if size else (-1, 0)

    def _find(self, text: Sequence[int], longest: int) -> tuple[int, int]:
        """How many of the last tokens are known as a context, and its place."""
        for size in range(min(longest, len(text)), 0, -1):
            place = self._places.get(key_of(text[len(text) - size :]))
            if place is not None:
                return size, place
        return 0, 0


def key_of(context: Sequence[int]) -> int:
    """The number that stands for a context."""
    key = 0
    for token in context:
        key = key << _BITS | token + 1
    return key


def count_successors(
    texts: NDArray[np.int64], best: NDArray[np.int64], odds: NDArray[np.float32], most: int = MOST_CONTEXTS
) -> KnownSuccessors:
    """Count what follows each context of texts [N, L]: the mean distribution of the rows that end with it.

    `best` and `odds` [N, L, K] are the likeliest successors of each token, and their probabilities. Of more than
    `most` contexts all single tokens are kept, as far as there is room, then those that occurred most often, of equal
    ones those whose best successor is the surest.
    """
    parts = [_of_length(size, texts, best, odds) for size in range(1, min(LONGEST, texts.shape[1]) + 1)]
    contexts, counts, tokens, chances = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((-chances[:, 0], -counts, contexts >= 1 << _BITS))[:most]
    kept = order[np.argsort(contexts[order])]
    return KnownSuccessors(contexts[kept], tokens[kept], np.rint(ODDS * chances[kept]).astype(np.uint8))


def _of_length(
    size: int, texts: NDArray[np.int64], best: NDArray[np.int64], odds: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32], NDArray[np.float64]]:
    """Contexts of so many tokens [n], how often each occurred, its best successors and their mean probabilities."""
    places = texts.shape[1] - size + 1
    keys = np.zeros((len(texts), places), np.int64)
    for offset in range(size):
        keys = keys << _BITS | texts[:, offset : offset + places] + 1
    contexts, context_of, counts = np.unique(keys.ravel(), return_inverse=True, return_counts=True)
    width = best.shape[2]
    rows, tokens = np.repeat(context_of.ravel(), width), best[:, size - 1 :].ravel()
    pairs, pair_of = np.unique(rows << _BITS | tokens, return_inverse=True)
    chances = odds[:, size - 1 :].ravel().astype(np.float64)
    sums: NDArray[np.float64] = np.bincount(pair_of.ravel(), weights=chances).astype(np.float64)
    return (contexts, counts, *_best_of_each(pairs >> _BITS, pairs & MOST_TOKENS, sums, counts))


def _best_of_each(
    rows: NDArray[np.int64], tokens: NDArray[np.int64], sums: NDArray[np.float64], counts: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """The WIDTH tokens of the largest sums in each row, and those sums ÷ the row's count."""
    order = np.lexsort((tokens, -sums, rows))
    rows, tokens, sums = rows[order], tokens[order], sums[order]
    first = np.searchsorted(rows, np.arange(len(counts)))
    rank = np.arange(len(rows)) - first[rows]
    kept = rank < WIDTH
    found = np.full((len(counts), WIDTH), -1, np.int32)
    chances = np.zeros((len(counts), WIDTH))
    found[rows[kept], rank[kept]] = tokens[kept]
    chances[rows[kept], rank[kept]] = (sums / counts[rows])[kept]
    return found, chances


class SuccessorsDrafter(TextFollower):
    """Follows the likeliest successors of the last three, two or one tokens, and lists all of them for trees.

    How sure a token is follows from its probability. Nothing is learned from the text, so drafts depend on its last
    three tokens alone; proposing takes about a microsecond a token.
    """

    def __init__(self, known: KnownSuccessors) -> None:
        self.known = known
        super().__init__()

    def propose(self, limit: int, after: Sequence[int] = ()) -> Draft:
        """The likeliest successor, its likeliest successor, and so on, until all of it together is unlikely."""
        text, tokens, sure, chance = [*self._text[-LONGEST:], *after], list[int](), list[int](), 1.0
        while len(tokens) < limit and chance > SHORTEST_ODDS:
            likeliest, odds = self.known.best_after(text)
            if likeliest < 0:
                break
            tokens.append(likeliest)
            text.append(likeliest)
            sure.append(bisect(CLASSES, odds))
            chance *= odds / ODDS
        pieces = tuple(Piece(SOURCE, sureness, len(list(run))) for sureness, run in groupby(sure))
        return Draft(tuple(tokens), pieces)

    def alternatives(self, draft: Sequence[int]) -> list[list[int]]:
        """The successors along a draft, whoever made it."""
        text = [*self._text[-LONGEST:], *draft]
        return [self.known.after(text[: len(text) - left])[1] for left in range(len(draft), -1, -1)]
