"""How drafts and confirms went: pure functions of the logs of steps and confirms, each defined in docs/measuring.md."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quasar_core.records import Stats, Step
from quasar_core.trace import sources, windows

TEXT_EDGES = (32, 64, 128, 256, 512, 1024)  # positions in the answer
MARGIN_EDGES = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # nats


@dataclass(frozen=True)
class Share:
    """A count of a `total`; `name` says what is counted."""

    name: str
    count: int
    total: int

    @property
    def value(self) -> float | None:
        """The share; None of nothing."""
        return self.count / self.total if self.total else None


@dataclass(frozen=True)
class Speculation:
    """What became of the drafts and windows of some answers.

    `accepted` counts the steps with a draft by how many of its tokens were accepted, from 0. `by_place` are accepted
    tokens of those drafted at each place of a draft; a token behind a refused one counts as refused. `by_drafter` are
    accepted tokens of those that each drafter offered. `by_position` are new tokens (count) and steps (total) by where
    in the answer the step began. `refused_by_margin` are refused tokens of those that confirms judged, by the
    verifier's margin.
    """

    accepted: list[int]
    by_place: list[Share]
    by_drafter: list[Share]
    by_position: list[Share]
    tokens_per_confirm: float | None
    refused_by_margin: list[Share]


def speculation(answers: Sequence[Stats], drafter: str = "ngram") -> Speculation:
    """The speculation of several answers; `drafter` names the drafts of steps that name none."""
    steps = [step for stats in answers for step in stats.step_log]
    confirms = sum(stats.confirms for stats in answers)
    confirmed = sum(stats.new_tokens - stats.prefill_tokens for stats in answers if stats.confirms)
    return Speculation(
        accepted=accepted_lengths(steps),
        by_place=by_place(steps),
        by_drafter=by_drafter(steps, drafter),
        by_position=by_position(answers),
        tokens_per_confirm=confirmed / confirms if confirms else None,
        refused_by_margin=refused_by_margin(answers),
    )


def accepted_lengths(steps: Iterable[Step]) -> list[int]:
    """How many steps with a draft had 0, 1, 2, … of its tokens accepted."""
    counts = Counter(step.accepted for step in steps if step.drafted)
    return [counts[length] for length in range(max(counts, default=-1) + 1)]


def by_place(steps: Sequence[Step]) -> list[Share]:
    """The acceptance rate of a draft's first token, its second, and so on."""
    longest = max((step.drafted for step in steps), default=0)
    return [
        Share(str(place + 1), sum(step.accepted > place for step in steps), sum(step.drafted > place for step in steps))
        for place in range(longest)
    ]


def by_drafter(steps: Iterable[Step], drafter: str) -> list[Share]:
    """Accepted of drafted tokens, by who proposed them."""
    drafted: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    for step in steps:
        names = sources(step, drafter)
        drafted.update(names)
        accepted.update(names[: step.accepted])
    return [Share(name, accepted[name], count) for name, count in drafted.items() if count]


def by_position(answers: Iterable[Stats]) -> list[Share]:
    """Tokens that steps yielded and the steps, by the place in the answer where each began.

    In `exact` a step yields what it puts into the window.
    """
    tokens: Counter[int] = Counter()
    steps: Counter[int] = Counter()
    for stats in answers:
        place = float(stats.prefill_tokens)
        scale = _kept(stats)
        for step in stats.step_log:
            at = bisect_right(TEXT_EDGES, int(place))
            tokens[at] += step.accepted + 1
            steps[at] += 1
            place += (step.accepted + 1) * scale
    names = _ranges(TEXT_EDGES)
    return [Share(names[at], tokens[at], steps[at]) for at in sorted(steps)]


def _kept(stats: Stats) -> float:
    """How much of what steps yield stays in the text."""
    made = sum(step.accepted + 1 for step in stats.step_log)
    return (stats.new_tokens - stats.prefill_tokens) / made if made else 1.0


def refused_by_margin(answers: Iterable[Stats]) -> list[Share]:
    """Refused of judged window tokens, by how sure the verifier was; empty where margins were not recorded."""
    refused: Counter[int] = Counter()
    judged: Counter[int] = Counter()
    for stats in answers:
        for _, waiting in windows(stats):
            for token in waiting:
                if token.judged and token.origin.margin is not None:
                    at = bisect_right(MARGIN_EDGES, token.origin.margin)
                    judged[at] += 1
                    refused[at] += not token.accepted
    names = _ranges(MARGIN_EDGES)
    return [Share(names[at], refused[at], judged[at]) for at in sorted(judged)]


def _ranges(edges: Sequence[float]) -> list[str]:
    """Names of ranges, such as "0–32", "32–64" and "from 64"."""
    pairs = zip((0, *edges), edges, strict=False)
    return [*(f"{low:g}–{high:g}" for low, high in pairs), f"from {edges[-1]:g}"]
