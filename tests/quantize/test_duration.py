"""The time that a dry run promises: a pure count of operations, rates of this machine, and rounding that is honest."""

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.plan_cases import BLOCK, BY_A_COPY, BY_TRANSFORMERS, CONFIG, LEAN, shape

from quasar_cli.main import run
from quasar_core.api import quantizing
from quasar_core.config import QuantizeConfig
from quasar_core.quantize import estimate
from quasar_core.quantize.blocks.streaming import open_target
from quasar_core.quantize.calibration import GREEDY_LENGTH, HELD_OUT_ROWS
from quasar_core.quantize.estimate import Rates, about, measure_rates, shape_of
from quasar_core.quantize.plan import Shape
from quasar_core.quantize.text_plan import Free, plan_text
from quasar_core.quantize.work import LAUNCHES, Work, count_work
from quasar_core.system import Load
from quasar_core.timing import Timing

pytest_plugins = ["helpers.quantize_fixtures"]


def test_passes_and_matrices_counted_by_hand() -> None:
    """Two models read 512 tokens of calibration and 8,192 greedy, one the greedy ones again, and 2,048 held out.

    q and k share one Hessian. Successors take the head over the 512 once more.

    A block has 6,656 weights, the head 3,200; a token attends to 64 others in 32 values, twice. Of the solvers, 8
    products [in, in] × [in, out] and 400 operations a weight: q and o 671,744 each, k 335,872, up 1,343,488 and down
    1,867,776. Half of three Hessians of 512 rows: 1,572,864; errors of q and k by their inputs, of o and down by their
    outputs: 524,288, 524,288 and 1,048,576; three factors of in³ ÷ 3: 109,227. Text takes 64 steps for 40 rows at once
    and 256 for the 32 greedy ones.
    """
    assert (HELD_OUT_ROWS, GREEDY_LENGTH) == (32, 256)
    work = count_work(shape(1), CONFIG, rows=40, text=LEAN)
    assert work.passes == 1.25 * (2 * 512 + 26_624) * (6_656 + 4_096) + 2 * 18_432 * 3_200 == 489_553_920
    solvers = 2 * 671_744 + 335_872 + 1_343_488 + 1_867_776
    assert work.sums == 1_572_864 + 2 * 524_288 + 1_048_576
    assert work.matrices == pytest.approx(solvers + 109_227, abs=1)
    assert work.launches == 320 * 400
    assert work.steps == 1.25 * 10_752 * (6_656 + 3_200 + 6 * 2_048)
    assert work.logits == 100 * (2.5 * 10_752 + 4 * 18_432 + 512)


def test_what_the_target_has_not_written_it_reads() -> None:
    lean, foreign, copied = (count_work(shape(1), CONFIG, 40, text) for text in (LEAN, BY_TRANSFORMERS, BY_A_COPY))
    read = 1.25 * 2_048 * (6_656 + 4_096)  # what is held out; greedy text it reads beside the verifier anyway
    assert foreign == replace(lean, passes=lean.passes + read), "what transformers leaves behind its blocks is not kept"
    assert copied == replace(lean, passes=lean.passes + read + 512 * 3_200), "nor does a copy say what the target would"
    file = replace(CONFIG, calibration="text.txt")
    assert count_work(shape(1), file, 40, LEAN).passes == lean.passes + read + 512 * 3_200


def test_work_grows_with_what_there_is_to_do() -> None:
    one, two = (count_work(shape(blocks), CONFIG, 40, LEAN) for blocks in (1, 2))
    assert two.matrices == 2 * one.matrices
    assert two.launches == 2 * one.launches
    assert one.passes < two.passes < 2 * one.passes  # the head is there once
    longer = count_work(shape(1), replace(CONFIG, samples=80), 40, LEAN)
    assert longer.sums > one.sums
    assert longer.matrices == one.matrices
    assert longer.launches == one.launches + 2 * 64 * LAUNCHES  # 112 rows, 40 at a time
    foreign = count_work(shape(1), replace(CONFIG, calibration="text.txt"), 40, LEAN)
    assert foreign.passes > one.passes
    assert foreign.steps < one.steps  # the greedy text alone


def test_experts_read_their_share() -> None:
    layers = {
        f"model.layers.0.mlp.experts.{i}.{name}": BLOCK[name] for i in range(8) for name in ("up_proj", "down_proj")
    }
    experts = replace(shape(1), layers=layers)
    all_of_it, a_quarter = (count_work(replace(experts, routed=share), CONFIG, 40, LEAN) for share in (1.0, 0.25))
    ends = 2 * HELD_OUT_ROWS * (64 + 2 * GREEDY_LENGTH) * 100 * 32
    assert a_quarter.passes - ends == pytest.approx(0.25 * (all_of_it.passes - ends))
    assert a_quarter.sums == 0.25 * all_of_it.sums
    assert a_quarter.matrices == all_of_it.matrices


def test_seconds_are_work_by_rates() -> None:
    work = Work(passes=100, steps=30, sums=20, matrices=10, logits=50, launches=1000)
    rates = Rates(passes=10, steps=10, sums=5, matrices=1, logits=25, launch=0.002)
    assert rates.seconds_of(work) == 10 + 3 + 4 + 10 + 2 + 2


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (1.2, "about 10 s"),
        (26, "about 30 s"),
        (84, "about 80 s"),
        (95, "about 2 min"),
        (725, "about 12 min"),
        (33 * 60, "about 35 min"),
        (5500, "about 2 h"),
        (11 * 3600, "about 11 h"),
        (52 * 3600, "about 50 h"),
    ],
)
def test_no_more_digits_than_are_known(seconds: float, said: str) -> None:
    assert about(seconds) == said


def test_rates_are_those_of_the_largest_layers_products() -> None:
    """By a clock on which everything takes a second.

    A pass has 512 tokens, a step 40 rows; matrices are 32 × 32 by 32 × 512; and a launch is one of a hundred.
    """
    clock = itertools.count()
    rates = measure_rates(shape(), CONFIG, torch.device("cpu"), torch.float32, 40, now=lambda: float(next(clock)))
    up_proj = 2048
    assert rates == Rates(512 * up_proj, 40 * up_proj, 32 * 32 * 512, 32 * 32 * 512, 32 * 100, 0.01)


@pytest.mark.parametrize("in_bf16", [True, False])
def test_sums_have_the_rate_of_passes_where_they_are_taken_in_bfloat16(
    in_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "sums_in_bf16", lambda *_: in_bf16)
    clock = itertools.count()
    rates = measure_rates(shape(), CONFIG, torch.device("cpu"), torch.float32, 40, now=lambda: float(next(clock)))
    assert rates.sums == (rates.passes if in_bf16 else rates.matrices)
    assert rates.passes != rates.matrices


def test_the_fastest_of_the_calls_within_the_time_counts() -> None:
    now, lengths = [0.0], iter([9.0, 0.1, 0.04, 0.2, 5.0])

    def call() -> None:
        now[0] += next(lengths)

    assert estimate._seconds(call, torch.device("cpu"), lambda: now[0]) == pytest.approx(0.04)


def test_a_dry_run_says_about_how_long(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = Rates(passes=1e9, steps=1e9, sums=1e9, matrices=1e9, logits=1e9, launch=1e-6)
    monkeypatch.setattr(estimate, "measure_rates", lambda *_: rates)
    arguments = ["quantize", str(source), "--group-size", "32", "--device", "cpu", "--dry-run"]
    assert run([*arguments, "--json"]) == 0
    seconds = json.loads(capsys.readouterr().out)["seconds"]
    target = open_target(source, torch.device("cpu"), torch.float32)
    config = QuantizeConfig(group_size=32)
    text = plan_text(source, target, Free())
    work = count_work(shape_of(target.skeleton, config), config, config.samples + HELD_OUT_ROWS, text)
    assert seconds == pytest.approx(rates.seconds_of(work))
    assert run(arguments) == 0
    assert about(seconds) in capsys.readouterr().out


@pytest.mark.parametrize(("others", "said"), [(0.02, "if nothing else runs"), (0.53, "other programs took 53 %")])
def test_a_busy_machine_is_said_beside_the_time(
    source: Path, others: float, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = Rates(passes=1e9, steps=1e9, sums=1e9, matrices=1e9, logits=1e9, launch=1e-6)
    monkeypatch.setattr(estimate, "measure_rates", lambda *_: rates)
    monkeypatch.setattr(estimate.LoadMeter, "read", lambda self: Load(others))
    assert run(["quantize", str(source), "--group-size", "32", "--device", "cpu", "--dry-run"]) == 0
    assert said in " ".join(capsys.readouterr().out.split())


def test_on_a_busy_machine_one_thread_is_measured_too(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that wait for one another reach a fiftieth of what one does alone."""
    threads: list[int] = []

    def measured(*_: Any) -> Rates:
        threads.append(torch.get_num_threads())
        return Rates(*[1e9] * 5, 1e-6) if threads[-1] == 1 else Rates(*[2e7] * 5, 1e-6)

    monkeypatch.setattr(estimate, "measure_rates", measured)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    config, seconds = QuantizeConfig(group_size=32), []
    try:
        for others in (0.0, 0.8):
            monkeypatch.setattr(estimate.LoadMeter, "read", lambda self, others=others: Load(others))
            seconds.append(quantizing.estimate(str(source), config, device="cpu").seconds)
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert threads == [2, 2, 1]
    assert seconds[1] < seconds[0] / 10


def test_rates_are_those_of_the_products_that_were_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine of ten products are interrupted, for up to fifty times as long as they take: the rate is the same."""
    luck = random.Random(0)

    def interrupted(work: Any, now: Any) -> Any:
        return lambda: 1e-3 * (1 if luck.random() < 0.1 else 1 + 50 * luck.random())

    monkeypatch.setattr(estimate, "timed", interrupted)
    monkeypatch.setattr(estimate, "MEASURED_SECONDS", 0.0)
    one_second = lambda sampler, *_, **named: Timing(tuple(sorted(sampler() for _ in range(200))))  # noqa: E731
    monkeypatch.setattr(estimate, "time_one", one_second)
    rates = measure_rates(shape(), CONFIG, torch.device("cpu"), torch.float32, 40)
    assert rates.steps == pytest.approx(40 * 64 * 32 / 1e-3)
    assert rates.launch == pytest.approx(1e-5)


def test_a_product_that_is_timed_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []
    linear = torch.nn.functional.linear

    def counted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        timed.append(x.numel() * len(weight))
        return linear(x, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    monkeypatch.setattr(estimate, "MEASURED_SECONDS", 0.0)
    large = Shape({"model.layers.0.mlp.down_proj": (1024, 4096)}, 1000, 800, 1024, 100)
    measure_rates(large, QuantizeConfig(), torch.device("cpu"), torch.float32, 100)
    assert max(timed) <= estimate.SHORT_PRODUCT


def test_what_is_not_counted_gets_no_time(source: Path) -> None:
    for config in (QuantizeConfig(mean_bits=4.25, group_size=32), QuantizeConfig(target_agreement=0.9, group_size=32)):
        assert quantizing.estimate(str(source), config, device="cpu").seconds is None
