"""Read what an arm's steps recorded as traces: what verifier, target and drafter said at each place of an answer.

The committed text is the same whatever was decided, so what was seen at a place holds for other decisions too: the
margin of the verifier's token there and whether the target took it, and how much of a draft was right.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from quasar_core.bench.results import Results
from quasar_core.decode.costs.pass_costs import CONTEXT, PairCosts, PassCost
from quasar_core.decode.policy.trees import SOURCE as BRANCH
from quasar_core.draft.base import Draft, first_pieces, pieces_behind
from quasar_core.errors import UsageError
from quasar_core.records import Confirm, MarginTable, Piece, Stats, Step

BINS = 16


@dataclass(frozen=True)
class Verified:
    """The verifier's token at a place: its margin, and whether it is the target's."""

    margin: float
    agrees: bool


@dataclass(frozen=True)
class Drafted:
    """A draft at a place: its pieces, how many of its tokens were right, and the branches beside it.

    `gained` is 1 where a branch was right behind them: it stood in the place of a token of the draft, or behind all.
    `left_out` is what the draft had behind these tokens, which was not checked.
    """

    pieces: tuple[Piece, ...]
    right: int
    branches: int = 0
    gained: int = 0
    left_out: tuple[Piece, ...] = ()

    @property
    def length(self) -> int:
        """Tokens of the draft."""
        return sum(piece.length for piece in self.pieces)

    @property
    def passed(self) -> int:
        """Tokens of a pass over it, but for the text's last one."""
        return self.length + self.branches

    def first(self, length: int) -> "Drafted":
        """At most so many tokens of the draft; what stood beside a longer one is left out of a shorter."""
        if length >= self.length:
            return self
        pieces = Draft((0,) * self.length, self.pieces).first(length).pieces
        return Drafted(pieces, min(self.right, length))

    @property
    def offered(self) -> Draft:
        """All that there was of it."""
        pieces = (*self.pieces, *self.left_out)
        return Draft((0,) * sum(piece.length for piece in pieces), pieces)

    def checked(self, length: int, behind: "Drafted | None") -> "Drafted":
        """So many tokens of all that was offered; `behind` is the draft of the place behind the pass that checked it.

        Where the draft was right and that one goes on from the same source, it is as right as that.
        """
        if length <= self.length or not self.left_out:
            return self.first(length)
        right = self.right
        if right == self.length and behind and behind.pieces[:1] and behind.pieces[0].source == self.left_out[0].source:
            right += 1 + behind.right
        return Drafted(self.offered.first(length).pieces, min(right, length))

    @classmethod
    def of(cls, step: Step, right: int) -> "Drafted":
        """What a step recorded, of which so many tokens were right: its path came first, branches among it."""
        path = first_pieces(step.pieces, right)
        gained = sum(piece.length for piece in path if piece.source == BRANCH)
        chain = tuple(piece for piece in step.pieces if piece.source != BRANCH)
        branches = sum(piece.length for piece in step.pieces if piece.source == BRANCH)
        return cls(chain, right - gained, branches, gained, tuple(step.left_out))


@dataclass
class Trace:
    """One answer behind its first token: its length, what is known of its places, and of what came to nothing.

    `prompt` tokens stand before it.
    Behind a token that the verifier had wrong drafts are right as far as the verifier took them.
    """

    tokens: int
    verified: dict[int, Verified] = field(default_factory=dict)
    drafted: dict[int, Drafted] = field(default_factory=dict)
    rests: dict[int, Drafted] = field(default_factory=dict)  # inside a draft that was right so far: what is left of it
    lost: list[Verified] = field(default_factory=list)
    lost_drafts: list[Drafted] = field(default_factory=list)
    prompt: int = 0

    def nearest_draft(self, place: int, like: Piece | None = None) -> Drafted | None:
        """The draft that was recorded nearest to a place, as what is copied comes in runs; None where none was.

        With a piece, of its source and sureness, and one that was checked.
        """
        known = self.drafted
        if like:
            kind = like.source, like.sureness
            known = {at: one for at, one in known.items() if [(p.source, p.sureness) for p in one.pieces[:1]] == [kind]}
        return known[min(known, key=lambda at: abs(at - place))] if known else None


@dataclass(frozen=True)
class Recorded:
    """Traces, what passes took on average, wherever they stood, and what each step took beside them, in seconds.

    `cut` says that drafts are as long as whoever recorded them let them be checked, else they are as they were offered.
    """

    traces: list[Trace]
    costs: PairCosts
    drafting_s: float
    other_s: float
    cut: bool = True

    @property
    def margins(self) -> MarginTable:
        """How often the target agreed, by margin, in bins of equal numbers."""
        seen = [verified for trace in self.traces for verified in trace.verified.values()]
        margins = np.array([verified.margin for verified in seen])
        agreed = np.array([verified.agrees for verified in seen])
        edges = np.unique(np.quantile(margins, np.linspace(0, 1, BINS + 1)[1:-1] ** 2)) if seen else np.array([])
        edges = edges[edges > 0]
        index = np.searchsorted(edges, margins, side="right")
        counts = np.bincount(index, minlength=len(edges) + 1)
        hits = np.bincount(index, weights=agreed, minlength=len(edges) + 1)
        return MarginTable(edges.tolist(), counts.tolist(), hits.astype(int).tolist())


def record_of(results: Results, arm: str) -> Recorded:
    """The traces of an arm of `exact`; UsageError where the file holds none."""
    stats = [row.stats for row in results.rows if row.arm == arm and row.stats and row.stats.step_log]
    if not stats:
        raise UsageError(f"The results have no answers of the arm {arm}.")
    if any(step.let_through for one in stats for step in one.step_log):
        raise UsageError(f"Answers of {arm} cannot be replayed: not all of it was confirmed.")
    if not any(one.confirm_log for one in stats) or not any(step.margins for one in stats for step in one.step_log):
        raise UsageError(
            f"The results hold no margins of the arm {arm}: it has no confirms, or an older version ran it. Run the "
            "bench again."
        )
    timed = _timed_passes(results)
    drafting_s, other_s = beside_passes(stats)
    return Recorded(
        traces=[trace_of(one) for one in stats],
        costs=PairCosts(cost_of(timed["verify"]), cost_of(timed["confirm"])),
        drafting_s=drafting_s,
        other_s=other_s,
        cut=not any(step.left_out for one in stats for step in one.step_log),
    )


def beside_passes(stats: Sequence[Stats]) -> tuple[float, float]:
    """Seconds of drafting, and of all else that is no pass's, for each pass of some answers."""
    passes = [timed for one in stats for _, timed in passes_of(one)]
    drafting = sum(step.draft_s for one in stats for step in one.step_log)
    other = sum(one.decode_s for one in stats) - drafting - sum(timed.seconds for timed in passes)
    return drafting / len(passes), max(other, 0.0) / len(passes)


def trace_of(stats: Stats) -> Trace:
    """What is known of each place of an answer."""
    trace = Trace(stats.new_tokens - stats.prefill_tokens, prompt=stats.prompt_tokens)
    place, window = 0, list[tuple[int, Step]]()  # committed so far; verify passes since, with their places
    for confirm, step in _in_order(stats):
        if confirm:
            _settle(trace, place, confirm.accepted, window)
            place, window = place + confirm.accepted + 1, []
        if step and step.by_target:
            survived = confirm is None or confirm.accepted == confirm.window
            start = place - 1 if confirm else place  # a confirm's bonus is the token behind the draft
            if survived:
                trace.drafted[start] = Drafted.of(step, step.accepted)
            else:
                trace.lost_drafts.append(Drafted.of(step, 0))
            place = start + step.accepted + 1 if survived else place
        elif step:
            window.append((place + sum(len(earlier.margins) for _, earlier in window), step))
    for start, draft in trace.drafted.items():
        for done in range(1, draft.right + 1):
            rest = Drafted(pieces_behind(draft.pieces, done), draft.right - done, left_out=draft.left_out)
            trace.rests[start + done] = rest
    return trace


def _in_order(stats: Stats) -> Iterator[tuple[Confirm | None, Step | None]]:
    """Confirms and steps as they came; together where one pass was both."""
    confirms = defaultdict[int, list[Confirm]](list)
    for confirm in stats.confirm_log:
        confirms[confirm.step].append(confirm)
    for number, step in enumerate(stats.step_log):
        joint = None
        for confirm in confirms[number]:
            if confirm.drafted:
                joint = confirm
            else:
                yield confirm, None
        yield joint, step
    yield from ((confirm, None) for confirm in confirms[len(stats.step_log)])


def _settle(trace: Trace, place: int, accepted: int, window: Sequence[tuple[int, Step]]) -> None:
    """The target took so many tokens of the window, which begins at `place`; the next was wrong, if there was one."""
    end = place + accepted
    for start, step in window:
        for offset, margin in enumerate(step.margins):
            if start + offset <= end:
                trace.verified[start + offset] = Verified(margin, start + offset < end)
            else:
                trace.lost.append(Verified(margin, True))
        if start > end:
            trace.lost_drafts.append(Drafted.of(step, step.accepted))
        else:
            trace.drafted[start] = Drafted.of(step, min(step.accepted, end - start))


@dataclass(frozen=True)
class TimedPass:
    """A pass over so many tokens, with so many positions before it."""

    tokens: int
    positions: int
    seconds: float


def _timed_passes(results: Results) -> dict[str, list[TimedPass]]:
    """All passes of a run, by model."""
    found: dict[str, list[TimedPass]] = {"verify": [], "confirm": []}
    for row in results.rows:
        if row.stats and not any(step.let_through for step in row.stats.step_log):  # else confirms passed more
            for model, timed in passes_of(row.stats):
                if timed.seconds:
                    found[model].append(timed)
    return found


def passes_of(stats: Stats) -> Iterator[tuple[str, TimedPass]]:
    """The passes of an answer as they came: whose, over how many tokens, and what stood before them."""
    place, window = stats.prompt_tokens, 0
    for confirm, step in _in_order(stats):
        if confirm:
            yield "confirm", TimedPass(confirm.window + 1 + confirm.drafted, place, confirm.seconds)
            place, window = place + confirm.accepted + 1, 0
        if step and step.by_target:
            if confirm is None:
                yield "confirm", TimedPass(step.drafted + 1, place, step.seconds)
            survived = confirm is None or confirm.accepted == confirm.window
            place += (step.accepted + (confirm is None)) * survived  # a confirm's bonus is the token behind the draft
        elif step:
            yield "verify", TimedPass(step.drafted + 1, place + window, step.seconds)
            window += step.accepted + 1


def cost_of(passes: Sequence[TimedPass]) -> PassCost:
    """The mean seconds of each size, and what a position more adds: to a pass, and for each of its tokens.

    Both are found by least squares, over the deviations from each size's means.
    """
    if not passes:
        return PassCost((1,), (0.0,))
    tokens = np.array([one.tokens for one in passes])
    seen = np.maximum([one.positions - CONTEXT for one in passes], 0).astype(float)
    sizes, index = np.unique(tokens, return_inverse=True)
    counts = np.bincount(index)

    def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.bincount(index, weights=values) / counts)

    seconds = np.array([one.seconds for one in passes])
    apart = seen - mean(seen)[index]
    (once, each), *_ = np.linalg.lstsq(np.stack([apart, apart * tokens], 1), seconds - mean(seconds)[index], rcond=None)
    slopes = np.maximum(once + each * sizes, 0.0)
    base = np.maximum(mean(seconds) - slopes * mean(seen), 0.1 * mean(seconds))
    whole = tuple(map(int, sizes))
    return PassCost(whole, tuple(base.tolist()), PassCost(whole, tuple(slopes.tolist())))
