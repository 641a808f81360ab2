"""The cost of a pass of T tokens, in seconds: what is known of it, and how it is corrected while decoding.

What a pass reads of the text before it takes time too, so the cost grows with the positions that it sees.
"""

from collections import defaultdict, deque
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol, runtime_checkable

import numpy as np

CONTEXT = 64  # positions before a timed pass
STRIDE = 32  # positions by which costs move on

# Passes of this run that count: so many of the latest of a size, none of them older than so many passes.
RECENT, OLD = 16, 64
KNOWN = 3  # of a size, from which on they count more than what was measured before
FEW, OLD_FEW = 8, 24  # of a size so few that all may have been disturbed: they count no longer than this
DISTURBED = 1.3  # times the time of a pass that nothing disturbed
SAME = 0.003  # by which a correction may be off before costs are found anew
# Times what decoding sees, either way: what was remembered is not believed of other sizes, and not kept.
DOUBTFUL, WRONG = 1.5, 2.0
TABLE = 65  # tokens of passes whose remembered cost is looked up


class Cost(Protocol):
    """Seconds of a pass."""

    def __call__(self, tokens: int) -> float:
        """Seconds of a pass of `tokens` tokens."""
        ...


@runtime_checkable
class PlacedCost(Cost, Protocol):
    """Seconds of a pass behind `CONTEXT` positions, and what they are behind others."""

    def at(self, positions: float) -> Cost:
        """Seconds of a pass that sees so many positions before it."""
        ...


@dataclass(frozen=True)
class PassCost:
    """Seconds of a pass, at some sizes; between them linear, beyond the last along the last slope.

    They are those behind `CONTEXT` positions, and `slope` is what each position more adds; None: nothing.
    """

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    slope: "PassCost | None" = None

    def at(self, positions: float) -> "PassCost":
        """Seconds of a pass that sees so many positions before it; fewer than `CONTEXT` count as that."""
        more = max(positions - CONTEXT, 0.0)
        if self.slope is None or not more:
            return self
        added = [more * self.slope(size) for size in self.sizes]
        return PassCost(self.sizes, tuple(map(sum, zip(self.seconds, added, strict=True))))

    def scaled(self, factor: float) -> "PassCost":
        """So many times the seconds, wherever it stands."""
        slope = self.slope and self.slope.scaled(factor)
        return PassCost(self.sizes, tuple(factor * seconds for seconds in self.seconds), slope)

    def __call__(self, tokens: int) -> float:
        """Seconds of a pass of `tokens` tokens."""
        if tokens > self.sizes[-1] and len(self.sizes) > 1:
            slope = (self.seconds[-1] - self.seconds[-2]) / (self.sizes[-1] - self.sizes[-2])
            return self.seconds[-1] + max(slope, 0.0) * (tokens - self.sizes[-1])
        return float(np.interp(tokens, self.sizes, self.seconds))


@dataclass(frozen=True)
class PairCosts:
    """Costs of the verify pass and of the confirm pass; the same model's in a mode without a verifier."""

    verify: Cost
    confirm: Cost


class LiveCost:
    """A known cost, corrected by the times of the passes themselves, at the positions that it was moved to.

    A cost of which no more is known holds at all positions.
    Of each class of sizes (1, 2, 3–4, 5–8, …) the latest passes are kept as multiples of the known cost; the mean of
    those that nothing disturbed is the correction, as other work only ever adds to a time: those hardly longer than the
    one at which the first eighth ends, which alone would be too low, of short passes the most. A class that was not
    seen lately goes by those that were: where the machine has become slower as a whole, all costs rise alike. Passes of
    a single token are the measure of the others, and are not forgotten.
    """

    def __init__(self, known: Cost) -> None:
        self.known = known
        self.passes = 0
        self._place = -1
        self._recent: defaultdict[int, deque[tuple[int, float]]] = defaultdict(lambda: deque(maxlen=RECENT))
        self._usual: dict[int, float] = {}  # of each class that was seen often enough
        self._costs: list[float] | None = None  # of passes of 0 to TABLE - 1 tokens, until a correction changes
        self.move_to(0)

    def move_to(self, positions: float) -> None:
        """Passes see so many positions from now on."""
        place = int(positions) // STRIDE
        if place != self._place:
            self._place = place
            self._here = self.known.at(positions) if isinstance(self.known, PlacedCost) else self.known
            self._table = np.array([self._here(tokens) for tokens in range(TABLE)])
            self._costs = None

    def __call__(self, tokens: int) -> float:
        """Seconds of a pass of `tokens` tokens; more never cost less than one."""
        costs = self._costs = self._costs or self._corrected()
        if tokens < TABLE:
            return costs[tokens]
        return max(self._here(tokens) * self._correction(_size_class(tokens)), self._least)

    def _corrected(self) -> list[float]:
        """The costs of many sizes at once: a decision asks for most of them."""
        costs = self._table * np.array([self._correction(size) for size in range(SIZE_OF[-1] + 1)])[SIZE_OF]
        return [*costs[:2].tolist(), *np.maximum(costs[2:], self._least).tolist()]

    @property
    def _least(self) -> float:
        """What no pass of several tokens costs less than: one of a single token, where that is known."""
        return float(self._table[1]) * self._correction(0) if self.seen(1) >= KNOWN else 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """A pass of `tokens` tokens took so long; a clock that did not move tells nothing."""
        if seconds <= 0:
            return
        self.passes += 1
        size = _size_class(tokens)
        self._recent[size].append((self.passes, seconds / self._known(tokens)))
        if self.passes % FEW == 0:
            self._forget_old()
        else:
            self._follow(size)

    def forget(self) -> None:
        """Go by what was known again: the passes were another model's."""
        self._recent.clear()
        self._usual.clear()
        self._costs = None

    def seen(self, tokens: int) -> int:
        """How many passes of about this size count."""
        return len(self._recent[_size_class(tokens)])

    @property
    def since_single(self) -> int:
        """Passes since the last one of a single token; all where there was none."""
        return self.passes - (self._recent[0][-1][0] if self._recent[0] else 0)

    @property
    def is_doubtful(self) -> bool:
        """Whether passes of a single token have cost something else than what was known."""
        return not 1 / DOUBTFUL <= self._correction(0) <= DOUBTFUL

    @property
    def contradicts(self) -> bool:
        """Whether many passes of a single token say that what was known is wrong."""
        return self.seen(1) >= RECENT // 2 and not 1 / WRONG <= self._correction(0) <= WRONG

    def _known(self, tokens: int) -> float:
        return float(self._table[tokens]) if tokens < TABLE else self._here(tokens)

    def _correction(self, size: int) -> float:
        """Of a class that was seen often enough its own; else what lies between its neighbours', 1 where none was."""
        seen = sorted(self._usual)
        below, above = [other for other in seen if other <= size][-1:], [other for other in seen if other >= size][:1]
        if not seen or (size == 0 and not below):
            return 1.0
        low, high = (below or above)[0], (above or below)[0]
        share = (size - low) / (high - low) if high > low else 0.0
        return (1 - share) * self._usual[low] + share * self._usual[high]

    def _follow(self, size: int) -> None:
        """Correct a class's costs by its latest passes, where that makes a difference."""
        usual, former = self._undisturbed(size), self._usual.pop(size, None)
        if usual is not None:
            self._usual[size] = former if former and abs(usual / former - 1) <= SAME else usual
        if self._usual.get(size) != former:
            self._costs = None

    def _undisturbed(self, size: int) -> float | None:
        multiples = sorted(multiple for _, multiple in self._recent[size])
        if len(multiples) < KNOWN:
            return None
        most = DISTURBED * multiples[len(multiples) // 8]
        return fmean(multiple for multiple in multiples if multiple <= most)

    def _forget_old(self) -> None:
        for size, recent in self._recent.items():
            while size and recent and self.passes - recent[0][0] > (OLD if len(recent) >= FEW else OLD_FEW):
                recent.popleft()
            self._follow(size)


def _size_class(tokens: int) -> int:
    return (tokens - 1).bit_length()


SIZE_OF = np.array([_size_class(tokens) for tokens in range(TABLE)])
