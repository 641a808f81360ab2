"""Who made each token of an answer, as the logs of steps and confirms tell it while the answer grows."""

from collections.abc import Iterator
from typing import Literal

from quasar_core.records import Stats, Step

# prompt: out of the prompt's own pass. draft: proposed by a drafter, and accepted. bonus: the verify pass's own.
# target: the confirm's own, behind a window that it accepted whole. corrected: the confirm's own in place of another.
Maker = Literal["prompt", "draft", "bonus", "target", "corrected"]


def makers(stats: Stats, confirms: bool) -> list[Maker]:
    """The maker of each committed token; `confirms` is whether tokens wait for the target."""
    made: list[Maker] = ["prompt"] * stats.prefill_tokens
    verified = (maker for step in stats.step_log for maker in _of_step(step))
    if not confirms:
        return [*made, *verified]
    for confirm in stats.confirm_log:
        window = _first(verified, confirm.window)
        made += window[: confirm.accepted]
        made.append("target" if confirm.accepted == confirm.window else "corrected")
    return made


def _of_step(step: Step) -> Iterator[Maker]:
    for _ in range(step.accepted):
        yield "draft"
    yield "bonus"


def _first(verified: Iterator[Maker], count: int) -> list[Maker]:
    return [maker for _, maker in zip(range(count), verified, strict=False)]
