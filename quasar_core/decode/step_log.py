"""Log what each pass did: traces show it, and a bench replays it."""

from collections.abc import Sequence
from dataclasses import replace

from quasar_core.draft.base import Draft
from quasar_core.records import Confirm, Piece, Stats, Step, as_recorded


class StepLog:
    """The steps and confirms of one answer; `of_target` says that the target verifies all drafts itself."""

    def __init__(self, stats: Stats, of_target: bool) -> None:
        self._stats, self._of_target = stats, of_target
        self.seconds = 0.0  # of all passes
        self.left_out: Sequence[Piece] = ()  # what the next step's draft has behind what is checked

    def step(
        self,
        draft: Draft,
        accepted: int,
        margins: Sequence[float],
        drafting_s: float,
        pass_s: float,
        by_target: bool = False,
    ) -> None:
        """A pass that checked a draft; `by_target` in a mode in which the verifier may have done so."""
        shown = as_recorded(list(margins))
        self.seconds += pass_s
        verifiers, targets = ([], shown) if by_target else (shown, [])
        by_target = by_target or self._of_target
        checked, left_out = list(draft.pieces), list(self.left_out)
        self.left_out = ()
        self._stats.step_log.append(
            Step(
                len(draft.tokens),
                accepted,
                checked,
                by_target,
                verifiers,
                drafting_s,
                pass_s,
                targets,
                left_out=left_out,
            )
        )

    def let_through(self, count: int) -> None:
        """Log that so many tokens at the window's beginning were committed behind the last step."""
        log = self._stats.step_log
        log[-1] = replace(log[-1], let_through=count)

    def confirm(
        self,
        window: Sequence[int],
        kept: int,
        draft: Draft,
        accepted: int,
        margins: Sequence[float],
        drafting_s: float,
        pass_s: float,
    ) -> None:
        """A confirm where there was a window, a step where there was a draft, or nothing but the newest token."""
        with_step = bool(draft.tokens) or not window
        own = kept if with_step and kept == len(window) else kept + 1  # margins that are not the step's
        if window:
            refused = window[kept] if kept < len(window) else None
            before, shown = len(self._stats.step_log), as_recorded(list(margins[:own]))
            confirm = Confirm(len(window), kept, len(draft.tokens), before, pass_s, shown, refused)
            self._stats.confirm_log.append(confirm)
            self.seconds += pass_s
        if with_step:
            seconds, rest = 0.0 if window else pass_s, margins[own : len(window) + accepted + 1]
            self.step(draft, accepted, rest, drafting_s, seconds, by_target=True)
