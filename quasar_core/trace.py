"""Find which model or drafter made each token of an answer; read and write traces, which show that.

The one place that knows how the logs of steps and confirms make up a text. `bench report` and `generate --trace` show
what it says, and the metrics of confirms are computed from it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from quasar_core.errors import UsageError, reason
from quasar_core.files import read_json, refuse_foreign, write_json
from quasar_core.records import Confirm, Stats, Step, stored_stats
from quasar_core.typed import build

FORMAT, FORMAT_VERSION = "quasar trace", 1

# prompt: out of the prompt's own pass. draft: proposed by a drafter, accepted by a pass. bonus: the verify pass's own.
# target: the confirm's own, behind a window that it accepted whole. corrected: the confirm's own in place of another.
Maker = Literal["prompt", "draft", "bonus", "target", "corrected"]
MAKERS: tuple[Maker, ...] = ("draft", "bonus", "target", "corrected", "prompt")


@dataclass(frozen=True)
class Origin:
    """Who made a token: `drafter` of a draft; `step` is the number of its verify pass, from 0, -1 before the first.

    `margin` is that of the pass that verified it or made it, in nats, `target_margin` the confirm's; None where they
    are not known. `confirmed` says whether the target accepted it, None where nothing confirms, or it made it itself.
    """

    by: Maker
    step: int = -1
    drafter: str | None = None
    margin: float | None = None
    target_margin: float | None = None
    confirmed: bool | None = None


@dataclass(frozen=True)
class WindowToken:
    """A token that waited for a confirm, with the verifier's margin; `judged` unless one before it was refused."""

    origin: Origin
    accepted: bool
    judged: bool


@dataclass(frozen=True)
class TracedToken:
    """A token of a shown text; `refused` is the text in whose place it stands."""

    text: str
    origin: Origin
    refused: str | None = None


@dataclass(frozen=True)
class Trace:
    """One answer, token by token; `verify` and `draft` name the mode."""

    model: str
    verifier: str | None
    verify: str
    draft: str
    prompt: str
    tokens: list[TracedToken]
    stats: Stats


def origins(stats: Stats, count: int, drafter: str = "ngram") -> list[Origin] | None:
    """Who made each of the `count` new tokens; None where the logs do not tell, as those of other programs.

    `drafter` is the name of a draft whose steps name none.
    """
    made = origins_so_far(stats, bool(stats.confirm_log), drafter)
    return made[:count] if len(made) >= count else None


def origins_so_far(stats: Stats, confirms: bool, drafter: str = "ngram") -> list[Origin]:
    """Who made each token of a growing answer; with `confirms`, the verifier's tokens wait for the target."""
    return GrowingOrigins(stats, confirms, drafter).read()


class GrowingOrigins:
    """Who made each token of an answer whose logs grow: what is settled is not read again; those of `gated`, once."""

    def __init__(self, stats: Stats, confirms: bool, drafter: str = "ngram") -> None:
        self._stats, self._confirms, self._drafter = stats, confirms, drafter
        self._made: list[Origin] = []
        self._steps = self._confirmed = 0  # entries of the logs that are settled

    def read(self) -> list[Origin]:
        """The origins of all tokens so far."""
        if not self._made:
            self._made = [Origin("prompt")] * self._stats.prefill_tokens
        if self._confirms:
            for passed in _passes(self._stats, self._drafter, self._steps, self._confirmed):
                self._made += passed.made
                self._steps = passed.end
                self._confirmed += passed.confirm is not None
        else:
            for number in range(self._steps, len(self._stats.step_log)):
                self._made += _of_step(number, self._stats.step_log[number], self._drafter)
            self._steps = len(self._stats.step_log)
        return self._made


def windows(stats: Stats, drafter: str = "ngram") -> Iterator[tuple[Confirm, list[WindowToken]]]:
    """Each confirm with the tokens that waited for it, as the steps before it yielded them."""
    return ((passed.confirm, passed.window) for passed in _passes(stats, drafter) if passed.confirm)


@dataclass(frozen=True)
class _TargetPass:
    """A pass of the target in `exact`: its confirm, the window, and what it left in the text.

    A pass without a window has no confirm. `end` is the number of the first step behind it.
    """

    confirm: Confirm | None
    window: list[WindowToken]
    made: list[Origin]
    end: int


def _passes(stats: Stats, drafter: str, first: int = 0, confirmed: int = 0) -> Iterator[_TargetPass]:
    """The target's passes in their order, as far as the logs make sense; from step `first` and a confirm on."""
    confirms = (stats.confirm_log[number] for number in range(confirmed, len(stats.confirm_log)))
    waiting = list[Origin]()
    due = next(confirms, None)
    for number in range(first, len(stats.step_log)):
        step = stats.step_log[number]
        if step.by_target:
            joint = due if due and due.drafted and due.step == number else None
            yield _checked(joint, waiting, number, step, drafter)
            due, waiting = (next(confirms, None) if joint else due), []
            continue
        waiting += _of_step(number, step, drafter)
        if step.let_through:
            yield _TargetPass(None, [], waiting[: step.let_through], number + 1)
            waiting = waiting[step.let_through :]
        if due and not due.drafted and len(waiting) >= due.window and due.step in (0, number + 1):  # 0: an older file
            yield _confirmed(due, waiting, number)
            due, waiting = next(confirms, None), []


def _confirmed(confirm: Confirm, waiting: Sequence[Origin], number: int) -> _TargetPass:
    """A pass over a window alone: what it accepts, and its own token."""
    window = [_judge(confirm, place, origin) for place, origin in enumerate(waiting[: confirm.window])]
    whole = confirm.accepted == confirm.window
    margin = confirm.margins[confirm.accepted] if len(confirm.margins) > confirm.accepted else None
    own = Origin("target" if whole else "corrected", number, target_margin=margin)
    return _TargetPass(confirm, window, [*(token.origin for token in window[: confirm.accepted]), own], number + 1)


def _checked(confirm: Confirm | None, waiting: Sequence[Origin], number: int, step: Step, drafter: str) -> _TargetPass:
    """A pass that checked a draft, or the newest token alone, behind a window or without one."""
    if confirm is not None and confirm.accepted < confirm.window:
        return _confirmed(confirm, waiting, number)  # the draft behind a refused token was not looked at
    own = [
        replace(origin, margin=None, target_margin=margin, by="target" if origin.by == "bonus" else origin.by)
        for origin, margin in zip(_of_step(number, step, drafter), _padded(step.target_margins, step), strict=True)
    ]
    if confirm is None:
        return _TargetPass(None, [], own, number + 1)
    before = _confirmed(confirm, waiting, number)
    return _TargetPass(confirm, before.window, [*before.made[:-1], *own], number + 1)


def _judge(confirm: Confirm, place: int, origin: Origin) -> WindowToken:
    accepted = place < confirm.accepted
    margin = confirm.margins[place] if accepted and place < len(confirm.margins) else None
    return WindowToken(replace(origin, confirmed=accepted, target_margin=margin), accepted, place <= confirm.accepted)


def _of_step(number: int, step: Step, drafter: str) -> list[Origin]:
    """What a pass yields: the accepted part of its draft, and its own token.

    The latter is one too many where an end of text was accepted; what follows in the logs, or the text's length, tells.
    """
    margins, names = _padded(step.margins, step), sources(step, drafter)
    drafted = [Origin("draft", number, names[place], margins[place]) for place in range(step.accepted)]
    return [*drafted, Origin("bonus", number, margin=margins[step.accepted])]


def _padded(margins: Sequence[float], step: Step) -> list[float | None]:
    """A margin, or None, of each token that a step yields."""
    return [*margins, *[None] * (step.accepted + 1)][: step.accepted + 1]


def sources(step: Step, drafter: str) -> list[str]:
    """Who proposed each token of a step's draft; `drafter`, where its pieces do not tell."""
    told = [piece.source for piece in step.pieces for _ in range(piece.length)][: step.drafted]
    return told + [drafter] * (step.drafted - len(told))


def show(pieces: Sequence[str], stats: Stats, refused: Sequence[str] = (), drafter: str = "ngram") -> list[TracedToken]:
    """The tokens of a text with who made them; `pieces` are their texts, `refused` those that confirms refused.

    Empty where the logs do not tell.
    """
    made = origins(stats, len(pieces), drafter)
    if made is None:
        return []
    others = iter(refused)
    return [
        TracedToken(piece, origin, next(others, None) if origin.by == "corrected" else None)
        for piece, origin in zip(pieces, made, strict=True)
    ]


def refused_ids(stats: Stats) -> list[int]:
    """The tokens that confirms refused, in order."""
    return [confirm.refused for confirm in stats.confirm_log if confirm.refused is not None]


# Files


def write_trace(trace: Trace, path: Path) -> None:
    """Write a trace as JSON, whole or not at all."""
    content = {**asdict(trace), "stats": trace.stats.to_dict(logs=True)}
    write_json(path, {"format": FORMAT, "format_version": FORMAT_VERSION, **content})


def read_trace(path: Path) -> Trace:
    """Read a trace; UsageError, in one sentence, where it is none."""
    return trace_from_dict(read_json(path, UsageError), path)


def trace_from_dict(content: dict[str, Any], path: Path) -> Trace:
    """Rebuild what `write_trace` wrote; raises as `read_trace`."""
    try:
        if not is_trace(content):
            raise ValueError(f"its format is not “{FORMAT}”")
        if content.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"format version {content.get('format_version')}, where {FORMAT_VERSION} is read")
        fields = {name: value for name, value in content.items() if name not in ("format", "format_version")}
        return build(Trace, {**fields, "stats": stored_stats(fields.get("stats"))})
    except ValueError as error:
        raise UsageError(f"{path} is not a trace of quasar generate: {reason(error)}.") from error


def is_trace(content: Any) -> bool:
    """Whether a file's content says that it is a trace."""
    return isinstance(content, dict) and content.get("format") == FORMAT


def refuse_foreign_trace(path: Path) -> None:
    """Refuse, before any work, a --trace that exists and that quasar did not write."""
    refuse_foreign(path, "--trace", "a trace of quasar generate", lambda found: is_trace(read_json(found)))
