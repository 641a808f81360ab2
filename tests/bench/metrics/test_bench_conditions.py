"""How far a run is to be trusted: identical arms, energy, and runs of several temperatures."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.bench_pair import CountingModel, TokenCache, make_pair
from helpers.bench_records import make_row, make_run, make_stats

from quasar_cli.render.bench import Shown, main_grids
from quasar_cli.render.bench_words import describe_noise
from quasar_core.bench.arms import BenchConfig, parse_arms
from quasar_core.bench.datasets import Dataset, Question
from quasar_core.bench.energy import EnergyMeter
from quasar_core.bench.metrics.arm_metrics import bytes_read, joules_per_token, measure, shares, spread
from quasar_core.bench.metrics.conditions import conditions
from quasar_core.bench.metrics.recompute import differences
from quasar_core.bench.results import Passes, Results
from quasar_core.bench.run import run_bench, schedule
from quasar_core.records import Confirm, Stats, Step

ARMS = ("vanilla", "vanilla-again")


def twins(factors: list[float]) -> Results:
    """Vanilla asked again; each question takes a factor longer then."""
    rows = []
    for number, factor in enumerate(factors):
        rows.append(make_row("vanilla", number, [1] * 5, make_stats(5, 4.0, [Step(0, 0)] * 4)))
        rows.append(make_row("vanilla-again", number, [1] * 5, make_stats(5, 4.0 * factor, [Step(0, 0)] * 4)))
    return Results(make_run(config=BenchConfig(ARMS)), rows)


@pytest.mark.parametrize(
    ("factors", "agree", "said"),
    [
        ([0.98, 1.02] * 6, True, "two identical arms agree"),
        ([1.2, 1.3] * 6, False, "two identical arms differ"),
        ([1.0] * 3, None, "too few questions to tell"),
    ],
)
def test_identical_arms_must_agree(factors: list[float], agree: bool | None, said: str) -> None:
    results = twins(factors)
    assert conditions(results).twins_agree is agree
    assert said in describe_noise(results)


def test_a_run_without_a_twin_says_nothing_of_noise() -> None:
    assert describe_noise(Results(make_run(), [])) == ""


def test_the_twin_is_asked_every_fourth_question_and_has_no_row_in_the_table() -> None:
    asked = Dataset("d", tuple(Question(number, "c", ("w3",)) for number in range(9)))
    order = [(job.question.question_id, job.arm.name) for job in schedule([asked], parse_arms(",".join(ARMS)), 1)]
    assert [question for question, arm in order if arm == "vanilla-again"] == [0, 4, 8]
    assert [question for question, arm in order if arm == "vanilla"] == list(range(9))
    (grid,) = main_grids(measure(twins([1.0] * 4)), Shown())
    assert [row[0] for row in grid.rows] == ["vanilla"]


def test_a_run_of_two_temperatures_has_a_table_for_each(tmp_path: Path) -> None:
    questions = tuple(Question(number, "c", (f"w{3 + number}",)) for number in range(2))
    config = BenchConfig(("vanilla", "exact"), (0.0, 1.0), max_new_tokens=8, num_draft_tokens=2, window=2)
    results = run_bench(make_pair(CountingModel(6)), [Dataset("d", questions)], config, tmp_path / "r.json")
    assert [(row.temperature, row.arm) for row in results.rows[:4]] == [
        (0.0, "vanilla"),
        (0.0, "exact"),
        (0.0, "exact"),
        (0.0, "vanilla"),
    ]
    assert {row.temperature for row in results.rows} == {0.0, 1.0}
    first, second = main_grids(measure(results), Shown(uncertain=True))
    assert (first.title[-5:], second.title[-5:]) == ("T = 0", "T = 1")
    greedy, sampled = (metric.identical for metric in measure(results) if metric.arm == "exact")
    assert (greedy, sampled) == (2, 2)


# By hand


def test_median_and_95th_percentile() -> None:
    found = spread([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found is not None
    assert (found.median, found.p95) == (3.0, pytest.approx(4.8))
    assert spread([]) is None


def test_shares_of_the_seconds_of_decoding() -> None:
    found = shares(Stats(decode_s=10.0, draft_s=1.0, verify_s=4.0, confirm_s=3.0))
    assert found is not None
    assert (found.draft, found.verify, found.confirm, found.other) == pytest.approx((0.1, 0.4, 0.3, 0.2))
    assert shares(Stats(decode_s=10.0)) is None


PASSES = {"target": Passes(1000, (), ()), "verifier": Passes(300, (), ())}


@pytest.mark.parametrize(
    ("arm", "confirms", "read"),
    [
        ("vanilla", [], 3000),
        ("quantized", [], 900),
        ("exact", [Confirm(2, 2), Confirm(1, 1)], 900 + 2000),
        ("exact", [], 3000),  # the target verified alone
        ("transformers", [], None),
    ],
)
def test_bytes_that_passes_read(arm: str, confirms: list[Confirm], read: int | None) -> None:
    total = Stats(step_log=[Step(0, 0)] * 3, confirm_log=confirms)
    assert bytes_read(arm, total, PASSES) == read
    assert bytes_read("vanilla", total, {}) is None


def test_a_pass_that_is_a_confirm_and_a_step_reads_its_bytes_once() -> None:
    steps = [Step(2, 1), Step(3, 2, by_target=True), Step(1, 1, by_target=True)]
    total = Stats(step_log=steps, confirm_log=[Confirm(2, 2, drafted=3, step=1)])
    assert bytes_read("exact", total, PASSES) == 300 + 2 * 1000


def test_the_floor_by_hand() -> None:
    row = make_row("vanilla", 1, [1, 2, 3, 4], make_stats(4, 2.0, [Step(0, 0)] * 3))
    run = make_run(passes=PASSES, bandwidth=3000.0)
    (metric,) = measure(Results(replace(run, config=BenchConfig(("vanilla",))), [row]))
    assert metric.bytes_per_token == 1000
    assert metric.floor_share == pytest.approx(3000 / 3000 / 2.0)


# Energy


def rapl(folder: Path, zone: str, joules: float, wrap: float = 1000.0) -> None:
    (folder / zone).mkdir(exist_ok=True, parents=True)
    (folder / zone / "energy_uj").write_text(str(int(joules * 1e6)))
    (folder / zone / "max_energy_range_uj").write_text(str(int(wrap * 1e6)))


def test_joules_of_all_packages_over_a_counter_that_begins_again(tmp_path: Path) -> None:
    rapl(tmp_path, "intel-rapl:0", 990.0)
    rapl(tmp_path, "intel-rapl:1", 5.0)
    rapl(tmp_path, "intel-rapl:0:0", 7.0)  # a part of the first package
    meter = EnergyMeter(powercap=tmp_path)
    rapl(tmp_path, "intel-rapl:0", 2.0)
    rapl(tmp_path, "intel-rapl:1", 8.0)
    assert meter.read() == pytest.approx(12.0 + 3.0)
    assert meter.sources == "2 processor packages by RAPL"


def test_the_platforms_counter_holds_the_packages_and_is_not_added_to_them(tmp_path: Path) -> None:
    rapl(tmp_path, "intel-rapl:0", 1.0)
    rapl(tmp_path, "intel-rapl:1", 100.0)
    (tmp_path / "intel-rapl:0" / "name").write_text("package-0\n")
    (tmp_path / "intel-rapl:1" / "name").write_text("psys\n")
    meter = EnergyMeter(powercap=tmp_path)
    rapl(tmp_path, "intel-rapl:0", 3.0)
    rapl(tmp_path, "intel-rapl:1", 150.0)
    assert meter.read() == pytest.approx(2.0)
    assert meter.sources == "1 processor package by RAPL"


class FakeNvml:
    """Counts in millijoules."""

    def __init__(self, *counts: int) -> None:
        self._counts = list(counts)

    def nvmlInit(self) -> None:
        """As NVML's."""

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        return self._counts.pop(0)


def test_a_gpu_counts_where_the_processor_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux lets root alone read RAPL."""
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(1000, 1000, 8000))  # type: ignore[arg-type]
    (tmp_path / "intel-rapl:0" / "energy_uj").mkdir(parents=True)  # reading it is an OSError
    meter = EnergyMeter(on_gpu=True, powercap=tmp_path)
    assert meter.sources == "the GPU by NVML"
    assert meter.read() == pytest.approx(7.0)


def test_where_nothing_tells_there_are_no_joules(tmp_path: Path) -> None:
    assert EnergyMeter(powercap=tmp_path / "none").read() is None
    assert EnergyMeter(powercap=tmp_path / "none").sources is None
    rapl(tmp_path, "intel-rapl:0", 1.0)
    meter = EnergyMeter(powercap=tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("?")
    assert meter.read() is None


class Counted(CountingModel):
    """Every pass takes two joules of the counter in a folder."""

    def __init__(self, powercap: Path) -> None:
        super().__init__()
        self.powercap, self.joules = powercap, 0.0

    def forward(self, tokens: Sequence[int], cache: TokenCache, last_only: bool = False) -> torch.Tensor:
        self.joules += 2
        rapl(self.powercap, "intel-rapl:0", self.joules)
        return super().forward(tokens, cache, last_only)


def test_a_run_counts_the_joules_of_each_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain answer takes a pass for each token, the prompt's for the first."""
    powercap = tmp_path / "powercap"
    rapl(powercap, "intel-rapl:0", 0.0)
    monkeypatch.setattr("quasar_core.bench.run.EnergyMeter", partial(EnergyMeter, powercap=powercap))
    asked = Dataset("d", (Question(1, "c", ("w3 w4",)), Question(2, "c", ("w5",))))
    run = BenchConfig(("vanilla",), max_new_tokens=6)
    results = run_bench(make_pair(target=Counted(powercap)), [asked], run, tmp_path / "r.json")
    assert [row.joules for row in results.rows] == [pytest.approx(12.0)] * 2
    (metric,) = measure(results)
    assert metric.joules_per_token == pytest.approx(2.0)
    assert results.run.energy == conditions(results).energy == "1 processor package by RAPL"
    assert differences(tmp_path / "r.json", results)[1] == []


def test_joules_a_token() -> None:
    rows = [make_row("vanilla", n, [1, 2], make_stats(2, 1.0, []), joules=3.0) for n in range(2)]
    assert joules_per_token(rows) == pytest.approx(1.5)
    assert joules_per_token([*rows, replace(rows[0], joules=None)]) is None
