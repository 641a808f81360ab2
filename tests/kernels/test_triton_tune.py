"""Block shapes of Triton's products are measured once for a device, and kept."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import interpreted  # noqa: F401  # first: it decides how kernels are compiled
from triton.runtime.errors import OutOfResources

from quasar_core.errors import QuasarError
from quasar_core.kernels.triton import blocks
from quasar_core.kernels.triton import tune as tune_module
from quasar_core.kernels.triton.adapters import TritonKernel
from quasar_core.kernels.triton.blocks import Blocks, dense_blocks, packed_blocks
from quasar_core.kernels.triton.tune import GatedWeight, candidates, tune, tune_missing
from quasar_core.kernels.triton.weights import prepare_packed
from tools.gpu_bench.cases import random_codes

CPU = torch.device("cpu")


@pytest.fixture
def shapes_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The tuned shapes of a device, the CPU in its place."""
    monkeypatch.setenv("QUASAR_HOME", str(tmp_path))
    monkeypatch.setattr(blocks, "_device_name", lambda device: "a GPU")
    monkeypatch.setattr(blocks, "_is_tunable", lambda device: True)
    blocks._kept.cache_clear()
    return blocks._kept(CPU).path


def test_the_fastest_shape_is_kept_and_used(shapes_file: Path) -> None:
    weight = prepare_packed(random_codes(4, 1088, 80, 128, symmetric=True), CPU)
    rule, wanted = packed_blocks(weight, CPU), Blocks(outputs=128, inputs=512, splits=2, stages=3)
    assert wanted != rule
    shapes = candidates(weight)
    assert shapes[0] == rule
    assert wanted in shapes
    times = iter([0.5 if blocks == wanted else 1.0 for blocks in shapes])
    assert tune([weight], torch.float16, timer=lambda launch: next(times)) == wanted
    assert packed_blocks(weight, CPU) == wanted
    assert [path.name for path in shapes_file.parent.glob("*.json")] == [shapes_file.name]


def test_shapes_of_other_sources_are_not_used(shapes_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that was changed is tuned anew."""
    tune_missing(two_shapes()[:1], torch.float16, lambda launch: 1.0)
    monkeypatch.setattr(blocks, "sources_hash", lambda: "another")
    blocks._kept.cache_clear()
    assert " 1 tuned in" in tune_missing(two_shapes()[:1], torch.float16, lambda launch: 1.0)


def two_shapes() -> list[Any]:
    """Two layers of one shape, of another one, and 16-bit weights of a third."""
    packed = [prepare_packed(random_codes(4, inputs, 80, 32, symmetric=True), CPU) for inputs in (64, 64, 96)]
    return [*packed, torch.zeros(80, 64, dtype=torch.float16)]


def test_only_shapes_that_are_not_known_are_tuned(shapes_file: Path) -> None:
    timed: list[object] = []
    timer = lambda launch: timed.append(launch) or 1.0  # noqa: E731
    note = tune_missing(two_shapes()[:2], torch.float16, timer)
    assert note.startswith("block shapes of Triton's products: 1 tuned in ")
    assert len(timed) == len(candidates(two_shapes()[0]))
    note = tune_missing(two_shapes(), torch.float16, timer)
    assert note.startswith("block shapes of Triton's products: 2 tuned in ")
    assert note.endswith("1 remembered")
    blocks._kept.cache_clear()  # as in another process
    timed.clear()
    assert tune_missing(two_shapes(), torch.float16, timer) == "block shapes of Triton's products: 3 remembered"
    assert not timed
    assert tune_missing([], torch.float16, timer) == ""


def test_a_gated_product_has_shapes_of_its_own(shapes_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = prepare_packed(random_codes(4, 1088, 256, 64, symmetric=True), CPU)
    shapes = candidates(GatedWeight(weight))
    assert shapes[0] == packed_blocks(weight, CPU, gated=True)
    assert {blocks.outputs for blocks in shapes} == {128}
    plain, launched = packed_blocks(weight, CPU), list[Any]()
    monkeypatch.setattr(
        tune_module, "multiply_packed", lambda *given, **named: launched.append((given[2].shape, named))
    )

    def timer(launch: Any) -> float:
        launch()
        return float(-len(launched))

    assert tune([GatedWeight(weight)], torch.float16, timer) == shapes[-1] == packed_blocks(weight, CPU, gated=True)
    assert launched[-1] == ((8, 128), {"blocks": shapes[-1], "gated": True})
    assert packed_blocks(weight, CPU) == plain
    dense = torch.zeros(256, 512, dtype=torch.float16)
    assert tune([GatedWeight(dense)], torch.float16, lambda launch: 1.0) == dense_blocks(dense, CPU, gated=True)


def test_candidates_are_compiled_side_by_side_before_they_are_timed(
    shapes_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = two_shapes()[0]
    shapes, compiled, timed = candidates(weight), set[Blocks](), list[Blocks]()

    def multiply(*given: Any, blocks: Blocks) -> None:
        if blocks == shapes[1]:
            raise OutOfResources(300_000, 232_448, "shared memory")
        if threading.current_thread() is threading.main_thread():
            assert blocks in compiled
            timed.append(blocks)
        compiled.add(blocks)

    monkeypatch.setattr(tune_module, "multiply_packed", multiply)
    monkeypatch.setattr(tune_module, "replay_seconds", lambda launch: launch() or float(len(shapes) - len(timed)))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(tune_module, "driver", SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0)))
    assert tune([weight], torch.float16) == shapes[-1]
    assert timed == [blocks for blocks in shapes if blocks != shapes[1]]


def test_tuning_tells_how_far_it_is(shapes_file: Path) -> None:
    told: list[tuple[str, int, int]] = []
    tune_missing(two_shapes(), torch.float16, lambda launch: 1.0, progress=lambda *step: told.append(step))
    assert told == [("tuning kernels", done, 3) for done in range(4)]
    told.clear()
    tune_missing(two_shapes(), torch.float16, lambda launch: 1.0, progress=lambda *step: told.append(step))
    assert not told


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_products_in_8_bits_are_tuned_too(shapes_file: Path, kind: torch.dtype) -> None:
    weight = torch.randint(-9, 9, (80, 512)).to(kind)
    rule, wanted = dense_blocks(weight, CPU), Blocks(outputs=128, inputs=512, splits=1, stages=3)
    shapes = candidates(weight)
    assert shapes[0] == rule
    times = iter([0.5 if blocks == wanted else 1.0 for blocks in shapes])

    def timer(launch: Any) -> float:
        launch()
        return next(times)

    found = tune([weight], torch.float16, timer)
    assert found == wanted == dense_blocks(weight, CPU)
    assert dense_blocks(weight.half(), CPU) != wanted


def test_all_weights_of_a_shape_are_multiplied_up_to_what_no_cache_holds(
    shapes_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = [torch.zeros(80, 64, dtype=torch.float16) for _ in range(5)]
    multiplied: list[int] = []
    monkeypatch.setattr(tune_module, "multiply_dense", lambda x, weight, out, blocks: multiplied.append(id(weight)))
    monkeypatch.setattr(tune_module, "_UNCACHED", 3 * weights[0].nbytes - 1)

    def timer(launch: Any) -> float:
        multiplied.clear()
        launch()
        return 1.0

    tune_missing(weights, torch.float16, timer)
    assert multiplied == [id(weight) for weight in weights[:3]]


def test_tuning_ends_with_its_time(shapes_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four seconds for two shapes, a second for each measurement: two seconds a shape, and no shape without one."""
    clock, timed = [0.0], list[float]()
    monkeypatch.setattr(tune_module.time, "perf_counter", lambda: clock[0])

    def timer(launch: Any) -> float:
        clock[0] += 1.0
        timed.append(clock[0])
        return -clock[0]  # each is faster than those before

    weights = two_shapes()[1:3]
    second = candidates(weights[0])[1]
    note = tune_missing(weights, torch.float16, timer, seconds=4.0)
    assert note == "block shapes of Triton's products: 2 tuned in 4.0 s"
    assert packed_blocks(weights[0], CPU) == second
    shapes_file.unlink()
    blocks._kept.cache_clear()
    timed.clear()
    tune_missing(two_shapes(), torch.float16, timer, seconds=0.0)
    assert len(timed) == 3


def test_a_shape_that_does_not_fit_the_gpu_is_passed_over(shapes_file: Path) -> None:
    weight = two_shapes()[0]
    fitting = candidates(weight)[3]
    answers = iter(candidates(weight))

    def timer(launch: Any) -> float:
        if next(answers) != fitting:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return 1.0

    assert tune([weight], torch.float16, timer) == fitting


def test_a_product_that_fails_in_every_shape_is_an_error_that_says_why(shapes_file: Path) -> None:
    def timer(launch: Any) -> float:
        raise RuntimeError("PassManager::run failed\nand more")

    with pytest.raises(QuasarError, match=r"packed 64 80 4 bits .* in every block shape: PassManager::run"):
        tune([two_shapes()[0]], torch.float16, timer)
    assert not shapes_file.exists()


def test_nothing_is_tuned_where_a_variable_says_so(shapes_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUASAR_TUNE", "0")
    note = tune_missing(two_shapes(), torch.float16, lambda launch: pytest.fail("it was timed"))
    assert note == "block shapes of Triton's products: a rule of thumb's for 3, as QUASAR_TUNE is 0"


def test_shapes_that_cannot_be_kept_are_used_and_said(shapes_file: Path) -> None:
    shapes_file.parent.write_text("a file where the folder should be")
    blocks._kept.cache_clear()
    weight = two_shapes()[0]
    slowest_first, times = candidates(weight), iter(range(1000, 0, -1))
    note = tune_missing([weight], torch.float16, lambda launch: float(next(times)))
    assert ", not kept: " in note
    assert packed_blocks(weight, CPU) == slowest_first[-1]


def test_candidates_near_the_rule_of_thumb_come_first() -> None:
    weight = prepare_packed(random_codes(4, 1088, 80, 128, symmetric=True), CPU)
    rule, *others = candidates(weight)
    assert rule == packed_blocks(weight, CPU)
    assert abs(others[0].stages - rule.stages) == 1
    assert others[0].splits == rule.splits
    assert (others[-1].outputs, others[-1].splits) != (rule.outputs, rule.splits)


def test_nothing_is_tuned_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_module, "tune_missing", lambda *args, **options: pytest.fail("it was called"))
    assert TritonKernel().tune([two_shapes()[0]], torch.float16) == ""


def test_a_damaged_file_of_shapes_is_tuned_anew_and_said(shapes_file: Path) -> None:
    shapes_file.parent.mkdir()
    shapes_file.write_text("{")
    blocks._kept.cache_clear()
    note = tune_missing(two_shapes()[:1], torch.float16, lambda launch: 1.0)
    assert f", measured anew: {shapes_file} is not readable JSON" in note
    blocks._kept.cache_clear()
    assert tune_missing(two_shapes()[:1], torch.float16) == "block shapes of Triton's products: 1 remembered"
