"""Runs of tokens in a text by plain search: the oracle of suffix automata."""

from collections import Counter
from collections.abc import Sequence

from quasar_core.draft.automaton import NONE


def places(text: Sequence[int], run: Sequence[int]) -> list[int]:
    """Where a run ends, in the text."""
    size = len(run)
    return [end for end in range(size, len(text) + 1) if list(text[end - size : end]) == list(run)]


def usual(text: Sequence[int], run: Sequence[int]) -> int:
    """The token that follows a run most often, of equal ones the one that reached that number last."""
    counts: Counter[int] = Counter()
    favourite = NONE
    for end in places(text, run):
        if end < len(text):
            counts[text[end]] += 1
            if favourite == NONE or counts[text[end]] >= counts[favourite]:
                favourite = text[end]
    return favourite
