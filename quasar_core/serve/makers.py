"""Who made each token of an answer, as the logs of steps and confirms tell it while the answer grows."""

from typing import Literal

from quasar_core.records import Confirm, Stats, Step

# prompt: out of the prompt's own pass. draft: proposed by a drafter, and accepted. bonus: the verify pass's own.
# target: the target's own, behind what it accepted. corrected: the target's own in place of a token that it refused.
Maker = Literal["prompt", "draft", "bonus", "target", "corrected"]


def makers(stats: Stats, confirms: bool) -> list[Maker]:
    """The maker of each committed token; `confirms` is whether the verifier's tokens wait for the target."""
    made: list[Maker] = ["prompt"] * stats.prefill_tokens
    if not confirms:
        return made + [maker for step in stats.step_log for maker in _of_step(step, "bonus")]
    window: list[Maker] = []
    waiting = list(stats.confirm_log)
    for number in range(len(stats.step_log) + 1):
        confirm = waiting.pop(0) if waiting and waiting[0].step == number else None
        if confirm:
            made += window[: confirm.accepted] + _own(confirm)
            window = []
        if number == len(stats.step_log):
            break
        step = stats.step_log[number]
        if not step.by_target:
            window += _of_step(step, "bonus")
        elif confirm is None or confirm.accepted == confirm.window:
            made += _of_step(step, "target")
    return made


def _of_step(step: Step, own: Maker) -> list[Maker]:
    """What a pass yields of a draft, and its own token."""
    return [*["draft"] * step.accepted, own]  # type: ignore[list-item]


def _own(confirm: Confirm) -> list[Maker]:
    """The token that a confirm adds; behind a whole window and a draft it is the draft's step that has it."""
    if confirm.accepted < confirm.window:
        return ["corrected"]
    return [] if confirm.drafted else ["target"]
