"""Progress of a whole run of quantizing, over all stages, by the time that each of them is expected to take."""

import time
from collections.abc import Callable, Mapping

from quasar_core.config import QuantizeConfig
from quasar_core.quantize.blocks.streaming import StreamedModel
from quasar_core.quantize.estimate import Rates, shape_of
from quasar_core.quantize.plan import Plan, Shape, rows_written
from quasar_core.quantize.text_plan import TextPlan
from quasar_core.quantize.work import COMPARE_COST, DRAW_COST, SUCCESSOR_COST, count_passes, count_tokens, count_work
from quasar_core.records import Progress

WHOLE = "the whole run"
NOMINAL = Rates(passes=5e10, steps=4e10, sums=5e10, matrices=5e10, logits=8e8, launch=2e-6)
TEXT, BLOCKS, COUNTING, FIDELITY = "writing", "quantizing", "counting successors", "measuring fidelity"
LEAST_SHARE = 0.02  # of a stage, from which on it tells how long the rest of it takes


def stage_seconds(shape: Shape, config: QuantizeConfig, rows: int, text: TextPlan) -> dict[str, float]:
    """Estimate the seconds of each stage, by the first words of its name."""
    work, tokens = count_work(shape, config, rows, text), count_tokens(shape, config, text)
    blocks, fidelity, counting = (each / NOMINAL.passes for each in count_passes(shape, config, tokens))
    logit = shape.vocabulary / NOMINAL.logits
    counted, compared = SUCCESSOR_COST * tokens.counted * logit, COMPARE_COST * tokens.compared * logit
    in_text = counted if tokens.unread == 0 else 0.0
    return {
        TEXT: work.steps / NOMINAL.steps
        + DRAW_COST * tokens.written * logit
        + in_text
        + work.launches * NOMINAL.launch,
        BLOCKS: blocks + work.sums / NOMINAL.sums + work.matrices / NOMINAL.matrices,
        COUNTING: counting + counted - in_text,
        FIDELITY: fidelity + compared,
    }


class WholeRun:
    """A Progress that passes everything on, and tells beside it how far the whole run has come, in thousandths.

    Thousandths are of time: those of the whole that have gone by, as far as it is known.
    """

    def __init__(
        self, progress: Progress, expected: Mapping[str, float], now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._progress, self._expected, self._now = progress, dict(expected), now
        self._start = now()
        self._stage, self._began = "", self._start  # the part that is under way
        self._taken: dict[str, float] = {}  # seconds of those that are over

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take the progress of a stage, as `Progress`."""
        self._progress(stage, done, total)
        part = next((name for name in self._expected if stage.startswith(name)), None)
        if part is None:
            return
        if part != self._stage:
            self._leave()
            self._stage, self._began = part, self._now()
        gone = self._now() - self._start
        left = self._left(done / total if total else 1.0)
        self._progress(WHOLE, round(1000 * gone / (gone + left)) if gone + left > 0 else 0, 1000)

    def finish(self) -> None:
        """End the run's progress."""
        self._progress(WHOLE, 1000, 1000)

    def _leave(self) -> None:
        if self._stage:
            self._taken[self._stage] = self._taken.get(self._stage, 0.0) + self._now() - self._began

    def _left(self, share: float) -> float:
        """Estimate the seconds of the rest of this part and of those that come after it."""
        took = self._now() - self._began
        known = dict(self._taken)
        if share >= LEAST_SHARE:
            known[self._stage] = took / share
        factor = sum(known.values()) / sum(self._expected[name] for name in known) if known else 1.0
        own = known.get(self._stage, factor * self._expected[self._stage])
        to_come = [name for name in self._expected if name not in known and name != self._stage]
        return max(own - took, 0.0) + factor * sum(self._expected[name] for name in to_come)


def over_whole_run(target: StreamedModel, config: QuantizeConfig, plan: Plan, progress: Progress) -> Progress:
    """Make a progress that also tells how far the whole run has come; the one given where that is not counted."""
    if config.mixed or config.backend != "native":
        return progress
    shape = shape_of(target.skeleton, config, element=target.dtype.itemsize)
    return WholeRun(progress, stage_seconds(shape, config, rows_written(shape, config, plan.text), plan.text))
