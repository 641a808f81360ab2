"""An n-gram language model over tokens: the yardstick that the demo model must beat.

Interpolated Witten-Bell smoothing (Bell, Cleary and Witten, 1990): P_n(w | c) = (count(c w) + T(c) · P_{n-1}) ÷
(count(c) + T(c)), where T(c) counts the distinct tokens seen after c, and P_0 is uniform.
"""

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class NgramModel:
    """Counts of every n-gram up to `order`, as sorted arrays of packed keys."""

    def __init__(self, tokens: Ids, vocab_size: int, order: int = 5) -> None:
        if vocab_size**order > 2**63:
            raise ValueError(f"{order} tokens of a vocabulary of {vocab_size} do not fit in 63 bits")
        self.vocab_size, self.order = vocab_size, order
        self.grams: list[tuple[Ids, Ids]] = []
        self.contexts: list[tuple[Ids, Ids, Ids]] = []
        for n in range(1, order + 1):
            keys, counts = np.unique(self._pack(tokens, n), return_counts=True)
            prefixes, first, distinct = np.unique(keys // vocab_size, return_index=True, return_counts=True)
            self.grams.append((keys, counts))
            self.contexts.append((prefixes, np.add.reduceat(counts, first), distinct))

    def _pack(self, tokens: Ids, n: int) -> Ids:
        """Key of the n-gram that ends at each position from n − 1 on."""
        key = np.zeros(len(tokens) - n + 1, dtype=np.int64)
        for i in range(n):
            key = key * self.vocab_size + tokens[i : len(tokens) - n + 1 + i]
        return key

    def bits(self, tokens: Ids) -> float:
        """Total bits that the model needs for `tokens`, the first order − 1 of them left out."""
        length = len(tokens) - self.order + 1
        probability = np.full(length, 1.0 / self.vocab_size)
        for n in range(1, self.order + 1):
            keys = self._pack(tokens, n)[-length:]
            gram = _look_up(keys, *self.grams[n - 1])
            prefixes, totals, distinct = self.contexts[n - 1]
            total = _look_up(keys // self.vocab_size, prefixes, totals)
            types = _look_up(keys // self.vocab_size, prefixes, distinct)
            seen = total > 0
            probability[seen] = ((gram + types * probability) / np.maximum(total + types, 1))[seen]
        return float(-np.log2(probability).sum())


def _look_up(keys: Ids, known: Ids, values: Ids) -> Ids:
    index = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[index] == keys, values[index], 0)
