"""The choice among kernels by their times, which are written by hand here; measuring; what is kept of it."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quasar_core.kernels import select, times
from quasar_core.kernels.base import LayerShape
from quasar_core.kernels.dense import DenseKernel
from quasar_core.kernels.select import choose_fastest, describe_kernels, select_kernel
from quasar_core.kernels.times import ROWS, forget_times, kernel_times, random_weight, shape_key, time_kernel
from quasar_core.system import QUIET, Load
from quasar_core.timing import Timing

CPU, BF16 = torch.device("cpu"), torch.bfloat16
LARGE = LayerShape(1024, 4096, bits=4, group_size=128, trivial_groups=True)
Measured = list[tuple[str, str]]


def steady(seconds: float, load: Load = QUIET) -> Timing:
    """Three times the same."""
    return Timing((seconds,) * 3, load)


class StandInKernel:
    """Runs anything, or nothing."""

    def __init__(self, name: str, obstacle: str | None = None) -> None:
        self.name, self.obstacle = name, obstacle

    def why_not(self, shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
        return self.obstacle

    def prepare(self, weight: Any, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(weight.out_features, weight.in_features, dtype=dtype)

    def multiply(self, x: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        return x @ prepared.t()


class StandInClock:
    """A clock that stands still but for `now += …`, and goes on by a step at each reading."""

    def __init__(self, step: float = 0.0) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def seconds_of(timings: dict[int, Timing]) -> dict[int, float]:
    return {rows: timing.seconds for rows, timing in timings.items()}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Measured]:
    """Make kernels of these names take these microseconds at 4 rows; returns what is measured, in order."""
    times._opened.cache_clear()

    def kernels(refused: str = "", **microseconds: float) -> Measured:
        measured: Measured = []

        def time_by_hand(kernel: Any, shape: LayerShape, device: torch.device, dtype: torch.dtype) -> dict[int, Timing]:
            measured.append((kernel.name, shape_key(shape)))
            return {rows: steady(microseconds[kernel.name] * 1e-6 * (rows / 4 if rows > 4 else 1)) for rows in ROWS}

        named = [StandInKernel(name) for name in microseconds if name != "dense"]
        no = [StandInKernel("broken", refused)] if refused else []
        monkeypatch.setattr(select, "PACKED_KERNELS", (*no, *named))
        monkeypatch.setattr(times, "time_kernel", time_by_hand)
        return measured

    return kernels


def test_the_fastest_is_chosen_and_the_reason_tells_all_figures(machine: Callable[..., Measured]) -> None:
    measured = machine(slow=216.4, fast=61.2, dense=553.0)
    choice = select_kernel(LARGE, CPU, BF16)
    assert choice.kernel.name == "fast"
    assert choice.reason == "fastest of 3 for 1024 → 4096: 61.2 µs at 4 rows, slow 216, dense 553"
    assert measured == [(name, "1024x4096-4bit-g128") for name in ("slow", "fast", "dense")]


def test_unpacked_weights_win_where_they_are_faster(machine: Callable[..., Measured]) -> None:
    machine(slow=216.0, dense=100.0)
    assert select_kernel(LARGE, CPU, BF16).kernel.name == "dense"


def test_unpacked_weights_do_not_compete_for_memory_that_is_not_there(
    machine: Callable[..., Measured], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = machine(slow=216.0, dense=100.0)
    monkeypatch.setattr("quasar_core.kernels.dense.free_on_device", lambda device: 500_000_000)
    choice = select_kernel(LARGE, CPU, BF16)
    assert choice.kernel.name == "slow"
    assert choice.reason.startswith(
        "not dense: 64 such layers dequantized would take 0.5 GB of the 0.5 GB that are free"
    )
    assert not measured


def test_a_kernel_that_cannot_run_is_named_with_its_reason(machine: Callable[..., Measured]) -> None:
    machine(refused="it takes 8-bit codes, not 4-bit", fast=50.0, dense=60.0)
    assert select_kernel(LARGE, CPU, BF16).reason.startswith(
        "not broken: it takes 8-bit codes, not 4-bit; fastest of 2"
    )


def test_the_kernel_of_whole_passes_is_not_measured_where_it_has_vectors(
    machine: Callable[..., Measured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls one by one, on a busy machine above all, make others look fast that lose the whole pass."""
    monkeypatch.setattr(select, "has_lanes", lambda: True)
    measured = machine(rival=1.0, vnni=100.0, dense=1.0)
    choice = select_kernel(LARGE, CPU, BF16)
    assert (choice.kernel.name, choice.reason, measured) == ("vnni", "what whole passes run on in C++", [])


@pytest.mark.parametrize(("rival", "chosen"), [(60.0, "rival"), (80.0, "vnni"), (120.0, "vnni")])
def test_where_it_has_no_lanes_it_gives_way_to_any_that_is_much_faster(
    machine: Callable[..., Measured], monkeypatch: pytest.MonkeyPatch, rival: float, chosen: str
) -> None:
    monkeypatch.setattr(select, "has_lanes", lambda: False)
    machine(vnni=100.0, rival=rival, dense=500.0)
    assert select_kernel(LARGE, CPU, BF16).kernel.name == chosen


def test_small_layers_are_not_measured(machine: Callable[..., Measured]) -> None:
    measured = machine(slow=216.0, fast=61.0, dense=1.0)
    choice = select_kernel(LayerShape(256, 255, 4, 128, True), CPU, BF16)
    assert (choice.kernel.name, measured) == ("slow", [])
    assert select_kernel(LayerShape(256, 256, 4, 128, True), CPU, BF16).kernel.name == "dense"


def test_a_shape_is_measured_once_and_remembered_by_the_next_run(machine: Callable[..., Measured]) -> None:
    measured = machine(slow=216.0, fast=61.0, dense=553.0)
    first = select_kernel(LARGE, CPU, BF16).reason
    assert select_kernel(LARGE, CPU, BF16).reason == first
    times._opened.cache_clear()
    assert select_kernel(LARGE, CPU, BF16).reason == first
    assert len(measured) == 3
    select_kernel(LARGE, CPU, torch.float32)
    assert len(measured) == 6
    forget_times()
    select_kernel(LARGE, CPU, BF16)
    assert len(measured) == 9


def test_measuring_tells_how_far_it_is(machine: Callable[..., Measured]) -> None:
    machine(slow=216.0, dense=553.0)
    told: list[tuple[str, int, int]] = []
    for _ in range(2):
        select_kernel(LARGE, CPU, BF16, progress=lambda *step: told.append(step))
    assert told == [("measuring kernels", done, 2) for done in range(3)]


def test_a_kernel_that_is_new_is_measured_beside_the_known_ones(machine: Callable[..., Measured]) -> None:
    machine(slow=216.0, dense=553.0)
    select_kernel(LARGE, CPU, BF16)
    measured = machine(slow=1.0, fast=61.0, dense=1.0)
    assert select_kernel(LARGE, CPU, BF16).kernel.name == "fast"
    assert measured == [("fast", "1024x4096-4bit-g128")]


def test_other_conditions_measure_anew(machine: Callable[..., Measured], monkeypatch: pytest.MonkeyPatch) -> None:
    measured = machine(slow=216.0, dense=553.0)
    select_kernel(LARGE, CPU, BF16)
    monkeypatch.setattr(times, "sources_hash", lambda: "another")
    select_kernel(LARGE, CPU, BF16)
    assert len(measured) == 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "is not readable JSON (Expecting value in line 1, column 1)"),
        ("[1]", "does not hold a JSON object"),
        ("{}", "is damaged"),
        ('{"conditions": {}, "values": {}}', "is damaged"),
    ],
)
def test_a_damaged_file_is_measured_anew_and_said(machine: Callable[..., Measured], content: str, reason: str) -> None:
    measured = machine(slow=216.0, dense=553.0)
    path = kernel_times(CPU, BF16).kept.path
    path.parent.mkdir(parents=True)
    path.write_text(content)
    times._opened.cache_clear()
    choice = select_kernel(LARGE, CPU, BF16)
    assert choice.reason.endswith(f"; measured anew: {path} {reason}")
    assert len(measured) == 2
    assert set(json.loads(path.read_text())["values"]) == {
        f"1024x4096-4bit-g128 on {name}" for name in ("slow", "dense")
    }
    times._opened.cache_clear()
    assert "damaged" not in select_kernel(LARGE, CPU, BF16).reason


@pytest.mark.parametrize("value", [{"4": 1.0}, {"1": 1.0, "4": -1.0, "8": 1.0}, {"1": 1.0, "4": "1", "8": 1.0}, 1.0])
def test_values_that_are_no_times_are_damage(machine: Callable[..., Measured], value: Any) -> None:
    machine(slow=216.0, dense=553.0)
    select_kernel(LARGE, CPU, BF16)
    path = kernel_times(CPU, BF16).kept.path
    content = json.loads(path.read_text())
    next(iter(content["values"].values()))["value"] = value
    path.write_text(json.dumps(content))
    times._opened.cache_clear()
    assert "is damaged" in select_kernel(LARGE, CPU, BF16).reason


def test_what_cannot_be_kept_is_used_and_said(machine: Callable[..., Measured], tmp_path: Path) -> None:
    machine(slow=216.0, fast=61.0, dense=553.0)
    (tmp_path / "home").write_text("a file")
    choice = select_kernel(LARGE, CPU, BF16)
    assert choice.kernel.name == "fast"
    assert "; not kept: " in choice.reason


def test_doctor_is_told_every_kernels_time_or_obstacle(
    machine: Callable[..., Measured], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(refused="it runs on CUDA, not on cpu", fast=61.2, slow=300.0, dense=2000.0)
    monkeypatch.setattr(select, "KERNELS", (*select.PACKED_KERNELS, select.DENSE, select.REFERENCE))
    reports = {report.name: report for report in describe_kernels(CPU, BF16)}
    assert reports["broken"].reason == "it runs on CUDA, not on cpu"
    assert not reports["broken"].usable
    assert reports["fast"].reason == "61.2 µs at 4 rows of a 4096 × 4096 layer of 4 bits: chosen"
    assert reports["fast"].seconds == pytest.approx(61.2e-6)
    assert reports["slow"].reason == "300 µs at 4 rows of a 4096 × 4096 layer of 4 bits"
    assert reports["dense"].reason.startswith("2000 µs")
    assert "as large as the target's" in reports["dense"].reason
    assert reports["reference"].reason.startswith("only by --kernel")


def test_measuring_times_every_row_count_of_a_part_of_a_large_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of 150,000 outputs costs no more to measure than a block's layer, and its time is the whole one's."""
    prepared: list[int] = []

    class Recording(StandInKernel):
        def prepare(self, weight: Any, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
            prepared.append(weight.out_features)
            return super().prepare(weight, device, dtype)[:, :8].contiguous()

        def multiply(self, x: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
            clock.now += 1e-6 * len(x)
            return x

    clock = StandInClock()
    seconds = time_kernel(Recording("r"), LayerShape(1024, 150_000, 4, 128, True), CPU, BF16, clock)
    assert prepared == [2048]
    assert seconds_of(seconds) == pytest.approx({rows: rows * 1e-6 * 150_000 / 2048 for rows in ROWS})


def test_interrupted_calls_do_not_count() -> None:
    """Every third call is interrupted by a second of something else."""
    calls, clock = itertools.count(), StandInClock()

    class Interrupted(StandInKernel):
        def multiply(self, x: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
            clock.now += 5e-6 + (next(calls) % 3 == 0)
            return x

    seconds = time_kernel(Interrupted("i"), LayerShape(64, 256, 4, 32, True), CPU, BF16, clock)
    assert seconds_of(seconds) == pytest.approx(dict.fromkeys(ROWS, 5e-6))


def test_a_kernel_with_shapes_to_choose_chooses_them_before_it_is_timed() -> None:
    events: list[str] = []

    class Tunable(StandInKernel):
        def tune(self, weights: Any, dtype: torch.dtype) -> str:
            events.append(f"tune {len(weights)} in {dtype}")
            return ""

        def multiply(self, x: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
            events.append("multiply")
            return super().multiply(x, prepared)

    time_kernel(Tunable("t"), LayerShape(64, 256, 4, 32, True), CPU, BF16)
    assert events[:2] == ["tune 32 in torch.bfloat16", "multiply"]
    assert events.count(events[0]) == 1


def test_choosing_needs_nothing_but_times() -> None:
    able = [StandInKernel("a"), StandInKernel("b")]
    seconds = {"a": {1: 1.0, 4: 3.0, 8: 3.0}, "b": {1: 2.0, 4: 2.0, 8: 9.0}}
    assert choose_fastest(able, seconds)[0].name == "b"


def test_random_codes_fill_their_bits() -> None:
    weight = random_weight(LayerShape(96, 40, 3, 32, True))
    assert weight.has_trivial_groups
    assert (int(weight.codes.min()), int(weight.codes.max())) == (0, 7)
    assert weight.dequantize().shape == (40, 96)


def test_a_real_kernel_is_measured() -> None:
    """By a clock that goes on by a microsecond whenever it is read."""
    timings = time_kernel(DenseKernel(), LayerShape(256, 256, 4, 128, True), CPU, BF16, StandInClock(1e-6))
    assert seconds_of(timings) == pytest.approx(dict.fromkeys(ROWS, 1e-6))


class TestTrouble:
    """Measuring that was disturbed: what is chosen, said, and kept."""

    @pytest.fixture
    def timings(self, machine: Callable[..., Measured], monkeypatch: pytest.MonkeyPatch) -> dict[str, Timing]:
        machine(slow=216.0, fast=61.0, dense=553.0)
        found = {name: steady(seconds) for name, seconds in (("slow", 216e-6), ("fast", 61e-6), ("dense", 553e-6))}
        monkeypatch.setattr(times, "time_kernel", lambda kernel, *_: dict.fromkeys(ROWS, found[kernel.name]))
        return found

    def test_what_a_busy_machine_gave_is_used_said_and_not_kept(self, timings: dict[str, Timing]) -> None:
        for name, timing in timings.items():
            timings[name] = Timing(timing.samples, Load(0.53))
        choice = select_kernel(LARGE, CPU, BF16)
        assert choice.kernel.name == "fast"
        assert choice.reason.endswith("; not kept, as the machine was busy: other programs took 53 % of the cores")
        assert not kernel_times(CPU, BF16).kept.path.exists()

    def test_a_later_quiet_run_measures_again_and_keeps_that(self, timings: dict[str, Timing]) -> None:
        timings["fast"] = steady(32.7e-3, Load(0.9))
        assert select_kernel(LARGE, CPU, BF16).kernel.name == "slow"
        timings["fast"] = steady(0.06e-3)
        times._opened.cache_clear()  # another process
        choice = select_kernel(LARGE, CPU, BF16)
        assert (choice.kernel.name, "not kept" in choice.reason) == ("fast", False)
        assert len(json.loads(kernel_times(CPU, BF16).kept.path.read_text())["values"]) == 3

    def test_times_that_do_not_repeat_are_refused(self, timings: dict[str, Timing]) -> None:
        timings["fast"] = Timing((61e-6, 95e-6, 300e-6))
        choice = select_kernel(LARGE, CPU, BF16)
        assert choice.kernel.name == "slow"
        assert choice.reason == (
            "the first of 3 in their order, as the times of fast do not repeat here; "
            "not kept, as its best times differ by 56 %"
        )

    def test_doctor_says_it_of_a_guess(self, timings: dict[str, Timing], monkeypatch: pytest.MonkeyPatch) -> None:
        timings["fast"] = Timing((0.8e-3, 32.7e-3, 33e-3))
        monkeypatch.setattr(select, "KERNELS", (*select.PACKED_KERNELS, select.DENSE, select.REFERENCE))
        reasons = {report.name: report.reason for report in describe_kernels(CPU, BF16)}
        assert "(a guess: its times do not repeat); not kept, as its best times differ by 3988 %" in reasons["fast"]
        assert ": chosen" in reasons["slow"]


def test_a_kernel_that_fails_while_it_is_measured_is_left_out_with_its_reason(
    machine: Callable[..., Measured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it raises; where all fail, the weight is dequantized."""
    machine(fast=5, slow=9, dense=20)
    by_hand, failing = times.time_kernel, {"fast"}

    def time_or_fail(kernel: Any, *given: Any) -> dict[int, Timing]:
        if kernel.name in failing:
            raise RuntimeError("no kernel image is available\nfor this device")
        return by_hand(kernel, *given)

    monkeypatch.setattr(times, "time_kernel", time_or_fail)
    choice = select_kernel(LARGE, CPU, BF16)
    assert choice.kernel.name == "slow"
    assert choice.reason.startswith("not fast: it failed while it was measured (no kernel image is available); fastest")
    times._opened.cache_clear()
    forget_times()
    failing |= {"slow", "dense"}
    choice = select_kernel(LARGE, CPU, BF16)
    assert (choice.kernel.name, choice.reason[-22:]) == ("dense", "so dequantized at load")
