"""The estimate over all stages of a quantization, by a clock made by hand."""

import pytest
from helpers.plan_cases import BY_A_COPY, BY_TRANSFORMERS, CONFIG, LEAN, shape

from quasar_core.quantize.text_plan import TextPlan
from quasar_core.quantize.whole_run import NOMINAL, WHOLE, WholeRun, stage_seconds
from quasar_core.quantize.work import count_work

EXPECTED = {"writing": 100.0, "quantizing": 300.0, "measuring fidelity": 100.0}
STAGES = (("writing calibration text", 20), ("quantizing", 30), ("measuring fidelity", 64))


def run(seconds: dict[str, float]) -> list[tuple[float, float]]:
    """Share of the time that has gone, and what was told of it, at every step of a run of stages so long."""
    clock, told, gone = [0.0], list[int](), list[float]()

    def progress(stage: str, done: int, total: int) -> None:
        if stage == WHOLE:
            told.append(done)
            gone.append(clock[0])

    whole = WholeRun(progress, EXPECTED, now=lambda: clock[0])
    for stage, steps in STAGES:
        for step in range(steps + 1):
            whole(stage, step, steps)
            clock[0] += seconds[stage] / steps if step < steps else 0.0
    whole.finish()
    assert told[-1] == 1000
    return [(at / clock[0], share / 1000) for at, share in zip(gone, told, strict=True)]


@pytest.mark.parametrize("slower", [0.1, 1.0, 40.0])
def test_a_machine_of_another_speed_is_known_as_soon_as_a_stage_is_under_way(slower: float) -> None:
    taken = {"writing calibration text": 100.0, "quantizing": 300.0, "measuring fidelity": 100.0}
    for gone, told in run({stage: slower * seconds for stage, seconds in taken.items()})[2:]:
        assert told == pytest.approx(gone, abs=0.002)


@pytest.mark.parametrize("quantizing", [150.0, 600.0])
def test_a_stage_that_was_weighed_wrongly_is_corrected_within_itself(quantizing: float) -> None:
    """Twice and half what was expected: at worst the estimate is off by so much; while the stage runs it is right."""
    steps = run({"writing calibration text": 100.0, "quantizing": quantizing, "measuring fidelity": 100.0})
    estimates = [(gone, gone / told) for gone, told in steps if told > 0]  # the whole, as a multiple of what it was
    assert all(0.5 <= 1 / whole <= 2.0 for _, whole in estimates[2:])
    assert all(1 / 1.5 <= whole <= 1.5 for gone, whole in estimates if gone > 0.4)


def test_stages_that_are_not_weighed_are_passed_on_alone() -> None:
    told: list[tuple[str, int, int]] = []
    whole = WholeRun(lambda *step: told.append(step), EXPECTED, now=lambda: 0.0)
    whole("checking weights", 1, 2)
    assert told == [("checking weights", 1, 2)]


def test_a_resumed_run_that_leaves_stages_out_ends_at_its_end() -> None:
    told: list[tuple[str, int, int]] = []
    clock = iter(range(100))
    whole = WholeRun(lambda *step: told.append(step), EXPECTED, now=lambda: float(next(clock)))
    whole("measuring fidelity", 0, 2)
    whole("measuring fidelity", 1, 2)
    whole.finish()
    shares = [done for stage, done, _ in told if stage == WHOLE]
    assert shares == sorted(shares)
    assert shares[-1] == 1000


@pytest.mark.parametrize("text", [LEAN, BY_TRANSFORMERS, BY_A_COPY], ids=["lean", "transformers", "copy"])
def test_the_stages_hold_all_of_the_work(text: TextPlan) -> None:
    stages = stage_seconds(shape(), CONFIG, 40, text)
    assert sum(stages.values()) == pytest.approx(NOMINAL.seconds_of(count_work(shape(), CONFIG, 40, text)))
    assert (stages["counting successors"] > 0) == (text is BY_A_COPY)
    assert set(stages) == {*EXPECTED, "counting successors"}
