"""Estimate P(agree), how often the target takes the verifier's choice, by its margin; corrected as it shows."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from quasar_core.decode.policy.window_values import Agreements, Means
from quasar_core.records import MarginTable

UNKNOWN = MarginTable([], [8], [8])  # of one that was never measured: nine of ten
# The shift of the log-odds begins with a standard deviation of a half: a text may well have 1.6 times the odds.
PRIOR_INFORMATION = 4.0
FADING = 0.998  # of what a token told, with each further one
LEAST, MOST = 1e-4, 1 - 1e-6  # so that odds are finite


class AgreementCurve:
    """P(agree | margin) from a margin table; each bin smoothed by one agreement and one disagreement."""

    def __init__(self, table: MarginTable) -> None:
        self.edges = np.array(table.edges)
        self.values = (np.array(table.agreed) + 1.0) / (np.array(table.counts) + 2.0)
        self.weights = np.array(table.counts) / max(sum(table.counts), 1)

    def __call__(self, margin: float) -> float:
        """The agreement of the bin that holds the margin."""
        return float(self.values[np.searchsorted(self.edges, margin, side="right")])


class Kind(Enum):
    """What the drafter had to say of a verified token; ANY is all of them."""

    FREE = 0  # nothing
    DRAFTED = 1  # the same
    INSTEAD = 2  # another token, which the verifier refused
    ANY = 3


# What is added to log-odds before anything was learned: verifier and drafter seldom err alike.
FIRST_SHIFTS = {Kind.FREE: 0.0, Kind.DRAFTED: 0.7, Kind.INSTEAD: 0.0, Kind.ANY: 0.0}


@dataclass(frozen=True)
class Estimate:
    """P(agree) of one token, of its kind and of any."""

    kind: Kind
    p: float
    any: float


@dataclass
class _Shift:
    """A shift of log-odds, and how much is known of it."""

    value: float
    prior: float
    information: float = PRIOR_INFORMATION

    def learn(self, estimate: float, agreed: bool) -> None:
        """What all tokens told, information and information · value, fades alike; then a step of Newton's."""
        told = self.information * (self.value - self.prior)
        self.information = PRIOR_INFORMATION + FADING * (self.information - PRIOR_INFORMATION)
        self.value = self.prior + FADING * told / self.information
        self.information += estimate * (1 - estimate)
        self.value += (agreed - estimate) / self.information


class RunningAgreement:
    """A curve whose odds of agreement are multiplied by e^shift, learned from what the target made of the tokens.

    log odds(p') = log odds(p) + shift, where shift has a normal prior around `shift`. Each outcome y of a token of
    estimate p' is a step of Newton's: information += p'(1 − p'), shift += (y − p') ÷ information. What was learned
    fades, as texts change. So a text, or a temperature, of which the verifier knows less than of the text that the
    curve was measured on corrects every margin alike, by few tokens.

    There is a shift for each kind of token: what drafter and verifier agree on is surer than its margin says, and what
    the verifier says against a sure draft is less so.
    """

    def __init__(self, curve: AgreementCurve, shift: float = 0.0) -> None:
        self.curve = curve
        self._shifts = {kind: _Shift(shift + first, shift + first) for kind, first in FIRST_SHIFTS.items()}
        self._log_odds = np.log(_bounded(curve.values) / (1 - _bounded(curve.values)))
        self._edges, self._odds_of_bins = curve.edges.tolist(), self._log_odds.tolist()  # for single looks

    def __call__(self, margin: float, kind: Kind = Kind.ANY) -> float:
        """The corrected agreement of a token verified with this margin."""
        return _share(self._odds_of_bins[bisect_right(self._edges, margin)] + self.shift(kind))

    def estimates(self, margins: Sequence[float], accepted: int, refused: bool) -> list[Estimate]:
        """Of the tokens that a verify pass adds: `accepted` drafted ones, and one instead of a refused or a missing."""
        last = Kind.INSTEAD if refused else Kind.FREE
        kinds = [Kind.DRAFTED if place < accepted else last for place in range(len(margins))]
        return [Estimate(kind, self(m, kind), self(m)) for m, kind in zip(margins, kinds, strict=True)]

    def shift(self, kind: Kind = Kind.ANY) -> float:
        """What is added to log-odds."""
        return self._shifts[kind].value

    @property
    def now(self) -> Agreements:
        """The corrected agreement of each bin, as often as its margins occurred."""
        return Agreements(self._corrected(Kind.ANY)[0], self.curve.weights)

    @property
    def means(self) -> Means:
        """The corrected agreement over all margins, by what the drafter had to say."""
        return Means(*(self._corrected(Kind.FREE, Kind.DRAFTED, Kind.INSTEAD) @ self.curve.weights).tolist())

    def learn(self, estimates: Sequence[Estimate], accepted: int) -> None:
        """The target accepted so many of these tokens; behind the first refused nothing is known."""
        for place, estimate in enumerate(estimates[: accepted + 1]):
            self._shifts[estimate.kind].learn(estimate.p, place < accepted)
            self._shifts[Kind.ANY].learn(estimate.any, place < accepted)

    def _corrected(self, *kinds: Kind) -> NDArray[np.float64]:
        """[kinds, bins]."""
        shifts = np.array([self.shift(kind) for kind in kinds])
        return np.asarray(1 / (1 + np.exp(-(self._log_odds + shifts[:, None]))))


def agreements_of(margins: MarginTable) -> Agreements:
    """The agreements of a verifier with these margins, as they were measured."""
    return RunningAgreement(AgreementCurve(margins)).now


def shift_to(curve: AgreementCurve, mean: float) -> float:
    """The shift of the log-odds at which a curve's agreement over all margins is `mean`."""
    low, high = -12.0, 12.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if RunningAgreement(curve, middle).now.mean < mean else (low, middle)
    return (low + high) / 2


def _share(log_odds: float) -> float:
    return 1 / (1 + math.exp(-log_odds)) if log_odds > -500 else 0.0


def _bounded(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.clip(values, LEAST, MOST)
