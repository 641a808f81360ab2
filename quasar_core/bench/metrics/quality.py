"""How good an answer is: agreement with the target's own text, and scores where a dataset has answers."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
_MARKED = re.compile(r"####\s*(" + _NUMBER.pattern + ")")


@dataclass(frozen=True)
class Agreement:
    """How far texts are the target's own: `equal` of `tokens` places, and the median place of the first difference.

    Places are compared one by one, so behind a difference texts may shift and differ everywhere. `first` is None where
    no text differs.
    """

    equal: int
    tokens: int
    first: float | None

    @property
    def value(self) -> float | None:
        """The share of equal places."""
        return self.equal / self.tokens if self.tokens else None


def agreement(pairs: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Agreement:
    """Compare texts with the target's own, as token ids."""
    equal = tokens = 0
    firsts = []
    for ours, theirs in pairs:
        equal += sum(a == b for a, b in zip(ours, theirs, strict=False))
        tokens += max(len(ours), len(theirs))
        if list(ours) != list(theirs):
            firsts.append(first_difference(ours, theirs))
    return Agreement(equal, tokens, median(firsts) if firsts else None)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """The first position at which two sequences differ; where one continues the other, the shorter's length."""
    for position, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return position
    return min(len(a), len(b))


def final_number(text: str) -> str | None:
    """The number that an answer to a problem of GSM8K ends in: behind `####` where that stands, else the last one.

    Without signs of thousands and of money, and without zeros that say nothing; None where there is no number.
    """
    found: list[str] = _MARKED.findall(text) or _NUMBER.findall(text)
    if not found:
        return None
    number = found[-1].replace(",", "").replace("$", "").rstrip(".")
    return number.rstrip("0").rstrip(".") if "." in number else number


def is_right_number(text: str, reference: str) -> bool:
    """GSM8K's exact match: the final number is the reference's."""
    wanted = final_number(reference)
    return wanted is not None and final_number(text) == wanted
