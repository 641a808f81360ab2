"""One estimate over all stages of a quantization, corrected by how long its stages take.

Stages are weighed by the operations that they hold, at nominal rates: no time is spent on measuring. What a stage that
is over, or under way, took instead corrects those that are to come.
"""

import time
from collections.abc import Callable, Mapping

from quasar_core.config import QuantizeConfig
from quasar_core.quantize.calibration import GREEDY_LENGTH, HELD_OUT_ROWS
from quasar_core.quantize.duration import Rates, count_work
from quasar_core.quantize.plan import Shape
from quasar_core.records import Progress

WHOLE = "the whole run"
NOMINAL = Rates(passes=5e10, steps=3e10, matrices=5e10, launch=5e-6)
TEXT, BLOCKS, FIDELITY = "writing", "quantizing", "measuring fidelity"
LEAST_SHARE = 0.02  # of a stage, from which on it tells how long the rest of it takes


def stage_seconds(shape: Shape, config: QuantizeConfig, rows: int) -> dict[str, float]:
    """Nominal seconds of each stage, by the first words of its name."""
    work = count_work(shape, config, rows)
    calibration = config.samples * config.calibration_length
    rest = HELD_OUT_ROWS * (config.calibration_length + GREEDY_LENGTH)
    passes = work.passes / NOMINAL.passes
    return {
        TEXT: work.steps / NOMINAL.steps + work.launches * NOMINAL.launch,
        BLOCKS: passes * calibration / (calibration + rest) + work.matrices / NOMINAL.matrices,
        FIDELITY: passes * rest / (calibration + rest),
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
        """As a Progress."""
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
        """The run is over."""
        self._progress(WHOLE, 1000, 1000)

    def _leave(self) -> None:
        if self._stage:
            self._taken[self._stage] = self._taken.get(self._stage, 0.0) + self._now() - self._began

    def _left(self, share: float) -> float:
        """Seconds of the rest of this part and of those that come after it."""
        took = self._now() - self._began
        known = dict(self._taken)
        if share >= LEAST_SHARE:
            known[self._stage] = took / share
        factor = sum(known.values()) / sum(self._expected[name] for name in known) if known else 1.0
        own = known.get(self._stage, factor * self._expected[self._stage])
        to_come = [name for name in self._expected if name not in known and name != self._stage]
        return max(own - took, 0.0) + factor * sum(self._expected[name] for name in to_come)
