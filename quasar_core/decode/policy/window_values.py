"""Find what a window is worth: dynamic programming over its length and its survival.

The survival s of a window of W tokens is the probability that the target agrees with all of them. Before each step a
draft turns up, one of the kinds that turned up lately, and is checked by one of the two models. Time is worth `rate`
tokens a second, the rate that decoding reaches; what a window is worth from now on is, in tokens,

    J(W, s) = E_draft max(1 + s·D − rate·confirm(W + 1 + k),  −rate·verify + s·(p + … + p^n) + E_p J(W + n, s·p^n))

of which the first is a target pass over the window and k draft tokens, D of which are expected to be right (the bonus
token is sure), the second a verify pass that adds n tokens, with each of which the target agrees at a chance p. At the
best rate that there is a fresh window is worth nothing: J(0, 1) = 0 (a renewal reward process; Howard, 1960).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from operator import mul

import numpy as np
from numpy.typing import NDArray

from quasar_core.decode.costs.pass_costs import Cost, PairCosts
from quasar_core.decode.policy.draft_values import worths_at_target

MAX_WINDOW = 32
# Where a confirm costs so many verifies, as it does where the target's weights are streamed, windows may be longer: the
# best one of tokens that are right with a chance of p has about √(2 · confirm ÷ verify ÷ (1 − p)).
LONGER_WINDOWS = ((20, 256), (10, 128))
SPACING = 0.08  # of log survivals
LEVELS = 64  # of survival, from 1 to 1 in 150
MOST_NEW = 17  # tokens that a verify pass adds to a window
NEWTON_STEPS, NUDGE = 8, 1.02  # at most, towards the best rate, and the multiple of it by which the fall of J is found
NEARLY, EXACTLY = 2.0, 0.02  # nudges that the last step may be long: where a rate was the best before, and where not

_Array = NDArray[np.float64]


@dataclass(frozen=True)
class Agreements:
    """The chances that the target agrees with a verified token [bins], and how often each occurs [bins]."""

    chances: _Array
    weights: _Array

    @property
    def mean(self) -> float:
        """Of all tokens."""
        return float(self.chances @ self.weights)


@dataclass(frozen=True)
class Means:
    """Chances that the target agrees with a verified token.

    Of one without a draft, of one that was drafted, and of one that came instead of a drafted one.
    """

    free: float
    drafted: float
    instead: float


@dataclass(frozen=True)
class Prospect:
    """What a draft that may turn up would bring at either model, checked to the length that is best there.

    Of `length` tokens the target is expected to accept `right`; the verifier adds `new` tokens to the window, its
    bonus included, in a pass of `passed` tokens.
    """

    right: float
    length: int
    new: float
    passed: int


@dataclass(frozen=True)
class WindowValues:
    """J(W, s) for one rate, on levels of −log s: table [longest window + 1, LEVELS]."""

    rate: float
    table: _Array
    rows: list[list[float]] = field(init=False, repr=False)  # the table, for single looks

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", self.table.tolist())

    @property
    def longest(self) -> int:
        """The longest window; the target must confirm it."""
        return len(self.table) - 1

    def __call__(self, tokens: int, survival: float) -> float:
        """What a window of so many tokens is worth from now on; one beyond the longest as much as that."""
        place = min(-math.log(max(survival, 1e-12)) / SPACING, LEVELS - 1.001)
        low = int(place)
        row, share = self.rows[min(tokens, self.longest)], place - low
        return (1 - share) * row[low] + share * row[low + 1]


def best_values(agreements: Agreements, prospects: Sequence[Prospect], costs: PairCosts) -> WindowValues:
    """J at the best rate, its `rate`. Where the target had better decode alone, that is the target's."""
    alone = sum(1 + prospect.right for prospect in prospects) / sum(costs.confirm(1 + p.length) for p in prospects)
    return better_values(agreements, prospects, costs, alone, EXACTLY)


def better_values(
    agreements: Agreements, prospects: Sequence[Prospect], costs: PairCosts, rate: float, nearly: float = NEARLY
) -> WindowValues:
    """J at about the best rate, from one that was the best before: by Newton's steps, down to one of `nearly` nudges.

    J(0, 1) falls with the rate, by the seconds that pass until the next confirm. J is found at two rates at once, and
    along the last step taken as linear: there other decisions are hardly better.
    """
    steps = _Steps(agreements, prospects, costs)
    for _ in range(NEWTON_STEPS):
        here, above = steps.tables_at(rate, NUDGE * rate)
        nudges = here[0, 0] / (here[0, 0] - above[0, 0])
        if abs(nudges) <= nearly:
            return WindowValues(rate * (1 + nudges * (NUDGE - 1)), here + nudges * (above - here))
        rate *= max(1 + nudges * (NUDGE - 1), 0.5)
    return WindowValues(rate, *steps.tables_at(rate))


def longest_window(costs: PairCosts) -> int:
    """The most tokens that may wait for a confirm."""
    ratio = costs.confirm(1) / costs.verify(1)
    return next((window for dear, window in LONGER_WINDOWS if ratio >= dear), MAX_WINDOW)


class _Steps:
    """What every rate has in common: arrays [prospects, LEVELS], and seconds [prospects]."""

    def __init__(self, agreements: Agreements, prospects: Sequence[Prospect], costs: PairCosts) -> None:
        longest = self._longest = longest_window(costs)
        survivals = np.exp(-SPACING * np.arange(LEVELS))
        self._right = np.array([prospect.right for prospect in prospects])[:, None] * survivals
        gained = [_sum_of_powers(agreements.mean, prospect.new) for prospect in prospects]
        self._gained = np.array(gained)[:, None] * survivals
        self._verify = np.array([costs.verify(prospect.passed) for prospect in prospects])
        lengths = np.array([prospect.length for prospect in prospects])
        confirm = np.array([costs.confirm(tokens) for tokens in range(1, longest + 2 + int(lengths.max()))])
        self._confirm = confirm[np.arange(longest + 1)[:, None] + lengths]  # [windows, prospects]
        new = np.minimum([prospect.new for prospect in prospects], MOST_NEW - 1.0)
        self._new, places = np.unique([new.astype(int), new.astype(int) + 1], return_inverse=True)
        moves = _moves(agreements.chances.tobytes(), agreements.weights.tobytes(), int(self._new[-1]))
        self._moves = np.stack([moves[count] for count in self._new])  # [news, LEVELS, LEVELS]
        self._shares = np.zeros((len(prospects), len(self._new)))  # between whole numbers of new tokens, linear
        for whole, share in zip(places.reshape(2, -1), (1 - new % 1, new % 1), strict=True):
            self._shares[np.arange(len(prospects)), whole] += share

    def tables_at(self, *rates: float) -> list[_Array]:
        """J [longest window + 1, LEVELS] at each rate, for drafts that turn up equally often.

        The longest window the target must confirm. Prospects and levels of all rates stand side by side: what this
        takes is numpy's calls.
        """
        prospects, paces = len(self._verify), np.repeat(rates, LEVELS)
        sure = np.tile(1 + self._right, len(rates))  # [prospects, rates · LEVELS], as all that follows
        verified = np.tile(self._gained, len(rates)) - self._verify[:, None] * paces
        tables = np.empty((self._longest + 1, LEVELS, len(rates)))
        for tokens in range(self._longest, -1, -1):
            best = sure - self._confirm[tokens][:, None] * paces
            if tokens < self._longest:
                np.maximum(best, verified + self._later(tokens, tables), out=best)
            tables[tokens] = best.sum(axis=0).reshape(len(rates), LEVELS).T / prospects
        return [tables[:, :, rate] for rate in range(len(rates))]

    def _later(self, tokens: int, tables: _Array) -> _Array:
        """E_p J(W + n, s·p^n) of each prospect, at each rate."""
        rows = tables[np.minimum(tokens + self._new, self._longest)]  # [news, LEVELS, rates]
        moved = (self._moves @ rows).transpose(0, 2, 1)
        return np.asarray(self._shares @ moved.reshape(len(rows), -1))


@lru_cache(maxsize=4)
def _moves(chances: bytes, weights: bytes, most: int) -> list[_Array]:
    """Matrices [LEVELS, LEVELS] that take values at s to their mean at s·p_1⋯p_n, for n from 0 to `most`.

    A token of chance p takes every survival as many levels down, most of them a whole number and a share of another.
    """
    down = np.minimum(-np.log(np.maximum(np.frombuffer(chances), 1e-12)) / SPACING, LEVELS - 1)
    whole, share = np.divmod(down, 1)
    low, of_bin = whole.astype(int), np.frombuffer(weights)
    falls = np.bincount([*low, *(low + 1)], [*(of_bin * (1 - share)), *(of_bin * share)], LEVELS + 1)
    levels = np.arange(LEVELS)
    once = np.triu(falls[np.abs(levels - levels[:, None])])
    once[:, -1] = falls.sum() - once[:, :-1].sum(axis=1)  # none falls lower
    powers = [np.eye(LEVELS)]
    for _ in range(most):
        powers.append(once @ powers[-1])
    return powers


def _sum_of_powers(p: float, count: float) -> float:
    """p + p² + … + p^count, between whole numbers linear."""
    whole = int(count)
    return sum(p**i for i in range(1, whole + 1)) + (count - whole) * p ** (whole + 1)


def prospect_of(
    by_target: Sequence[float],
    by_verifier: Sequence[float],
    costs: PairCosts,
    rate: float,
    whole: bool = False,
    rests: Sequence[float] | None = None,
) -> Prospect:
    """A draft of these chances, cut to where a token more is worth less than its time; with `whole`, not at all.

    `rests` as of `worths_at_target`.
    """
    worths = worths_at_target(0, 1.0, by_target, costs.confirm, rate, rests)
    length = len(by_target) if whole else max(range(len(worths)), key=worths.__getitem__)
    right = sum(accumulate(by_target[:length], mul))
    accepted, checked = _cut(by_verifier, costs.verify, rate, whole)
    return Prospect(right, length, 1 + accepted, 1 + checked)


def _cut(chances: Sequence[float], cost: Cost, rate: float, whole: bool) -> tuple[float, int]:
    """Tokens expected to be right, and the length, at which tokens − rate · seconds is most."""
    expected, alive, best = 0.0, 1.0, (-rate * cost(1), 0.0, 0)
    for length, chance in enumerate(chances, start=1):
        alive *= chance
        expected += alive
        worth = (expected - rate * cost(1 + length), expected, length)
        best = worth if worth[0] > best[0] or whole else best
    return best[1], best[2]
