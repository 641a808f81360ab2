"""Choose the verifier of a target that makes `exact` fastest on this device: `quantize --bits auto`.

What passes of each candidate cost is measured on random codes of its layout; how often the target agrees, on a look at
the target's greedy text (`quantize/candidates.py`); what follows from both, by replaying that text under the decisions
that decoding takes (`simulate.py`), with the drafts that decoding would have. Solving is dear, so a candidate is solved
only if it would be the best were it to agree as often as the most faithful one.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np
import torch

from quasar_core.bench.simulation.simulate import Policy, replay
from quasar_core.bench.simulation.traces import Drafted, Recorded, Trace, Verified
from quasar_core.bench.verifiers.streamed_target import ConfirmCost
from quasar_core.config import BITS, GenerationConfig, QuantizeConfig
from quasar_core.decode.costs.pass_costs import PairCosts, PassCost
from quasar_core.decode.policy.lengths import LEAST_GAIN, MAX_DRAFT
from quasar_core.draft.make import Sources, make_drafter
from quasar_core.draft.successors import KnownSuccessors
from quasar_core.quantize.calibration import GREEDY_FROM
from quasar_core.quantize.candidates import Look
from quasar_core.typed import build

UNIFORM_BITS, MEAN_BITS = (4, 8), (4.5, 5.0, 6.0)
HEADS = (16, 8, 4)
LOW = 0.95  # agreement below which it is said what would help
DECISIONS = Policy("as it pays")
LONGEST_CIRCLE = 64  # tokens


@dataclass(frozen=True)
class Body:
    """The codes of all blocks: bits of a weight, a mean where layers have their own, and the group size."""

    bits: float
    group_size: int

    @property
    def mixed(self) -> bool:
        """Whether layers have widths of their own."""
        return self.bits not in BITS

    def config(self, base: QuantizeConfig, head: int) -> QuantizeConfig:
        """The quantization that makes it, with a head of so many bits."""
        widths: dict[str, Any] = {"mean_bits": self.bits} if self.mixed else {"bits": int(self.bits)}
        return replace(base, **widths, group_size=self.group_size, lm_head_bits=head)

    def describe(self) -> str:
        """The codes in words, such as "8 bits in groups of 128"."""
        bits = f"{self.bits:g} bits{' by layer' if self.mixed else ''}"
        return f"{bits} in {'whole rows' if self.group_size == -1 else f'groups of {self.group_size}'}"


@dataclass(frozen=True)
class Row:
    """A candidate: bytes of its checkpoint, milliseconds of its pass of one token, tokens per second of `exact`.

    Without `agreement` it was not solved, and `rate` is what it would reach if it agreed as the most faithful one does.
    A rate of 0 says that memory does not hold it. Beside it the target's pass of one token takes `confirm_ms` and reads
    `moved` bytes from the disk.
    """

    bits: float
    group_size: int
    head: int
    size: int
    verify_ms: float
    agreement: float | None
    rate: float
    confirm_ms: float = 0.0
    moved: int = 0

    @property
    def body(self) -> Body:
        """The codes of its blocks."""
        return Body(self.bits, self.group_size)

    def describe(self) -> str:
        """The candidate in words, such as "8 bits in groups of 128, head 8"."""
        return f"{self.body.describe()}, head {self.head}"


@dataclass(frozen=True)
class Choice:
    """The table that a verifier was chosen from, the best first, and what the target's passes take beside that.

    `ceiling` is the rate of one as cheap as the best that always agrees. `tokens` of held-out text were replayed.
    `trouble` says why costs may be another program's doing.
    """

    rows: list[Row]
    confirm_ms: float
    ceiling: float
    tokens: int
    trouble: str | None = None

    @property
    def best(self) -> Row:
        """What is made."""
        return self.rows[0]

    def config(self, base: QuantizeConfig) -> QuantizeConfig:
        """The quantization that was chosen."""
        return self.best.body.config(base, self.best.head)

    @property
    def streams(self) -> bool:
        """Whether blocks of the target are read from the disk beside a verifier."""
        return any(row.moved for row in self.rows)

    def sentences(self) -> list[str]:
        """What was chosen, why costs may be off, and what would help."""
        best = self.best
        chosen = (
            f"Chosen of {len(self.rows)}: {best.describe()}, which agrees with {best.agreement:.3f} of the target's "
            f"tokens and is expected to decode {best.rate:.1f} tokens/s."
        )
        return [chosen, *([f"Costs may be off: {self.trouble}."] if self.trouble else []), *advice(self)]

    @classmethod
    def parse(cls, content: Any) -> "Choice":
        """Read the JSON form; ValueError for anything else."""
        choice = build(cls, content)
        if not choice.rows or choice.rows[0].agreement is None:
            raise ValueError("no choice")
        return choice

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def advice(choice: Choice) -> list[str]:
    """Where the best agrees rarely, what would help and by how much; sentences, none where it agrees often enough."""
    best = choice.best
    if best.agreement is None or best.agreement >= LOW:
        return []
    said = [
        f"The target agrees with {best.agreement:.3f} of this verifier's tokens. One as cheap that always agreed would "
        f"reach {choice.ceiling:.1f} tokens/s ({_change(choice.ceiling, best.rate)})."
    ]
    surer = [row for row in choice.rows if row.agreement is not None and row.agreement > best.agreement]
    for row in _best_of_bodies(surer):
        assert row.agreement is not None
        said.append(
            f"{row.describe()}: agreement {row.agreement:.3f} (+{row.agreement - best.agreement:.3f}), "
            f"{row.rate:.1f} tokens/s ({_change(row.rate, best.rate)})."
        )
    return said


def _best_of_bodies(rows: Sequence[Row]) -> list[Row]:
    """The fastest row of each body."""
    found: dict[Body, Row] = {}
    for row in rows:  # the fastest first
        found.setdefault(row.body, row)
    return list(found.values())


def _change(rate: float, before: float) -> str:
    return f"{100 * (rate / before - 1):+.0f} %"


# What a text tells


class Replayed:
    """Rows of the target's greedy text [n, T], with the drafts that decoding would have at each place.

    A row ends where it begins to go round in circles, as a small model's often do: an answer is not read on there, and
    each draft is right.
    """

    def __init__(
        self, rows: torch.Tensor, known: KnownSuccessors | None, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._first = first = min(GREEDY_FROM, rows.shape[1] - 1)
        answers = [row[: max(circles_from(row), first + 1)] for row in rows.tolist()]
        self.tokens = sum(len(row) - first for row in answers)
        sources = Sources(known=known)
        start = now()
        self._drafted = [_drafts_along(row, first, sources) for row in answers]
        self._drafting_s = (now() - start) / self.tokens  # of a step

    def rate(self, look: Look, costs: PairCosts) -> float:
        """Tokens per second of `exact`, counting passes and drafting; choosing tokens is part of a pass."""
        traces = []
        for margins, agreed, drafted in zip(look.margins, look.agreed, self._drafted, strict=True):
            said = list(map(Verified, margins, agreed))[: len(drafted)]
            traces.append(Trace(len(drafted), dict(enumerate(said)), dict(enumerate(drafted)), prompt=self._first))
        return replay(Recorded(traces, costs, drafting_s=self._drafting_s, other_s=0.0, cut=False), DECISIONS)


def circles_from(row: Sequence[int]) -> int:
    """Where a row begins to repeat the same tokens, at most `LONGEST_CIRCLE`, three times or more up to its end.

    The row's length where it does not.
    """
    found = len(row)
    for period in range(1, min(LONGEST_CIRCLE, len(row) // 3) + 1):
        pairs = zip(reversed(row[period:]), reversed(row[:-period]), strict=True)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if same >= 2 * period:
            found = min(found, len(row) - period - same)
    return found


def _drafts_along(row: Sequence[int], first: int, sources: Sources) -> list[Drafted]:
    """The draft at each place of a row from `first` on, and how much of it is right; what is learned stays."""
    drafter = make_drafter(GenerationConfig(), sources)
    drafter.observe(row[:first])
    found = []
    for place in range(first, len(row)):
        draft = drafter.propose(MAX_DRAFT)
        pairs = zip(draft.tokens, row[place:], strict=False)
        right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        known = draft.first(len(row) - place)
        sources.acceptance.count(known.pieces, right)
        found.append(Drafted(known.pieces, right))
        drafter.observe(row[place : place + 1])
    return found


# The search


Costs = Callable[[Body, int], PassCost]  # of a verify pass, by body and bits of the head
Confirms = Callable[[Body, int], ConfirmCost | None]  # of the target beside a verifier; None where it does not fit
Try = Callable[[Sequence[Body]], Mapping[tuple[Body, int], Look]]  # solve bodies; a look at each with each head
Rate = Callable[[Look, PairCosts], float]
Size = Callable[[Body, int], int]  # bytes of a checkpoint


class Search:
    """Tries bodies in the order of what they promise; each with every head.

    `costs` may be estimates of a body that was not tried; they are asked again when it was.
    """

    def __init__(
        self,
        heads: Sequence[int],
        costs: Costs,
        confirms: Confirms,
        try_bodies: Try,
        rate: Rate,
        size: Callable[[Body, int], int],
    ) -> None:
        self.heads, self._costs, self._confirms = heads, costs, confirms
        self._try, self._rate, self._size = try_bodies, rate, size
        self.looks: dict[tuple[Body, int], Look] = {}
        self.rows: dict[tuple[Body, int], Row] = {}
        self._surest: dict[int, Look] = {}  # of each head, the look of the body that agrees most often

    def run(self, uniform: Sequence[Body], mixed: Sequence[Body]) -> Choice:
        """The table, the best first: both ends of the uniform bodies, what else promises more, then mixed ones."""
        cheapest = min(uniform, key=lambda body: self._costs(body, self.heads[0])(1))
        surest = max(uniform, key=lambda body: (body.bits, -body.group_size))
        self._solve(list(dict.fromkeys([cheapest, surest])))
        self._surest = {head: self.looks[surest, head] for head in self.heads}
        for bodies in (uniform, mixed):
            left = [body for body in bodies if (body, self.heads[0]) not in self.rows]
            self._solve([body for body in left if self._bound(body) > self.best.rate * (1 + LEAST_GAIN)])
        return self._choice()

    @property
    def best(self) -> Row:
        """The fastest of the rows that were tried."""
        return max((row for row in self.rows.values() if row.agreement is not None), key=lambda row: row.rate)

    def _solve(self, bodies: Sequence[Body]) -> None:
        if not bodies:
            return
        for (body, head), look in self._try(bodies).items():
            self.looks[body, head] = look
            self._note(body, head, look, look.agreement)

    def _bound(self, body: Body) -> float:
        """What the body would reach if it agreed as the surest does; noted as such."""
        return max(self._note(body, head, self._surest[head], None).rate for head in self.heads)

    def _note(self, body: Body, head: int, look: Look, agreement: float | None) -> Row:
        cost = self._costs(body, head)
        confirm = self._confirms(body, head)
        rate = self._rate(look, PairCosts(cost, confirm.cost)) if confirm else 0.0
        beside = (1000 * confirm.cost(1), confirm.moved) if confirm else (0.0, 0)
        row = Row(body.bits, body.group_size, head, self._size(body, head), 1000 * cost(1), agreement, rate, *beside)
        self.rows[body, head] = row
        return row

    def _choice(self) -> Choice:
        best = self.best
        others = sorted((row for row in self.rows.values() if row != best), key=lambda row: -row.rate)
        look = self.looks[best.body, best.head]
        always = Look(look.margins, [[True] * len(row) for row in look.agreed])
        confirm = self._confirms(best.body, best.head)
        costs = self._costs(best.body, best.head)
        ceiling = self._rate(always, PairCosts(costs, confirm.cost)) if confirm else 0.0
        return Choice([best, *others], best.confirm_ms, ceiling, sum(map(len, look.margins)))


def between(low: PassCost, high: PassCost, share: float) -> PassCost:
    """A cost between two, at the sizes of the first."""
    seconds = [(1 - share) * taken + share * high(size) for size, taken in zip(low.sizes, low.seconds, strict=True)]
    return replace(low, seconds=tuple(seconds))


def with_head(body: PassCost, other: PassCost, plain: PassCost) -> PassCost:
    """The cost of a body whose head is another, by what that head added to `plain`'s: `other`."""
    added = [other(size) - plain(size) for size in body.sizes]
    seconds = np.maximum(np.array(body.seconds) + added, 0.1 * np.array(body.seconds))
    return replace(body, seconds=tuple(np.maximum.accumulate(seconds).tolist()))
