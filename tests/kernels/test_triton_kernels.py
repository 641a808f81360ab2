"""Every Triton kernel against float64, in Triton's interpreter."""

import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import interpreted  # noqa: F401  # first: it decides how kernels are compiled
from triton.runtime.errors import OutOfResources

from quasar_core.errors import QuasarError
from quasar_core.kernels.base import LayerShape
from quasar_core.kernels.select import select_kernel
from quasar_core.kernels.triton import adapters as triton_kernel
from quasar_core.kernels.triton import attention, blocks, shares, weights
from quasar_core.kernels.triton import tune as tune_module
from quasar_core.kernels.triton.adapters import TritonKernel
from quasar_core.kernels.triton.blocks import Blocks, dense_blocks, gated_blocks, packed_blocks
from quasar_core.kernels.triton.packed import multiply_packed
from quasar_core.kernels.triton.tune import GatedWeight, candidates, tune, tune_missing
from quasar_core.kernels.triton.unpack import dequantize_packed
from quasar_core.kernels.triton.weights import dequantize, prepare_packed
from tools.gpu_bench.cases import Case, random_codes, relative_error
from tools.gpu_bench.checks import correctness_cases

CPU = torch.device("cpu")
# Codes beside bfloat16 in one shape and in `slow`: the interpreter takes both types as float32.
SLOW = re.compile(r"(packed .* group (?!128)|joined attention).* bfloat16")
CASES = [
    pytest.param(case, id=case[0], marks=[pytest.mark.slow] if SLOW.fullmatch(case[0]) else [])
    for case in correctness_cases(CPU, small=True)
]


@pytest.mark.parametrize("case", CASES)
def test_kernels_agree_with_float64(case: Case) -> None:
    error, tolerance = case[1]()
    assert error <= tolerance


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(128, 16, 32), (160, 72, 64), (384, 80, -1), (96, 96, 96), (48, 64, 16)])
def test_the_order_of_the_tensor_cores_loses_nothing(bits: int, shape: tuple[int, int, int]) -> None:
    weight = random_codes(bits, *shape, symmetric=False)
    prepared = prepare_packed(weight, CPU)
    assert torch.equal(dequantize(prepared, torch.float32), weight.dequantize())
    assert torch.equal(dequantize_packed(prepared, torch.float16), dequantize(prepared, torch.float16))
    tight = prepare_packed(weight, CPU, tight=True)
    assert torch.equal(dequantize(tight, torch.float32), weight.dequantize())
    assert tight.words.numel() <= prepared.words.numel()


def test_an_expert_of_few_inputs_takes_no_more_than_its_codes() -> None:
    """768 inputs of 4 bits in groups of 128: three steps of 256, not two of 512."""
    assert weights.tight_chunk(768, 128, 4) == 64
    assert weights.tight_chunk(2048, 128, 4) == 128
    assert weights.tight_chunk(768, 128, 8) == 128
    assert weights.tight_chunk(96, 16, 4) == 16


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_large_layer_is_packed_in_parts(monkeypatch: pytest.MonkeyPatch, symmetric: bool) -> None:
    """Of a head that lies the other way in memory, too."""
    weight = random_codes(8, 96, 200, 32, symmetric)
    whole = prepare_packed(weight, CPU)
    monkeypatch.setattr(weights, "_AT_ONCE", 1)
    turned = replace(weight, codes=weight.codes.t().contiguous().t(), scales=weight.scales.t().contiguous().t())
    for layer in (weight, turned):
        assert torch.equal(prepare_packed(layer, CPU).words, whole.words)


@pytest.mark.parametrize("rows", [1, 17, 65])
def test_the_kernel_takes_any_number_of_rows(rows: int) -> None:
    weight = random_codes(4, 160, 72, 32, symmetric=True)
    kernel = TritonKernel()
    x = torch.randn(rows, 160, generator=torch.Generator().manual_seed(0)).half()
    y = kernel.multiply(x, kernel.prepare(weight, CPU, torch.float16))
    assert relative_error(y, x.double() @ weight.dequantize().double().t()) < 1e-3


def test_the_kernel_says_what_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, cuda, half = TritonKernel(), torch.device("cuda"), torch.float16
    shape = LayerShape(96, 32, 4, 32, True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert kernel.why_not(shape, cuda, half) == "it needs compute capability 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_kernel, "_why_not_built", lambda device: None)
    assert kernel.why_not(shape, cuda, half) is None
    assert kernel.why_not(shape, CPU, half) == "it runs on CUDA, not on cpu"
    assert "float32" in (kernel.why_not(shape, cuda, torch.float32) or "")
    assert "g_idx" in (kernel.why_not(LayerShape(96, 32, 4, 32, False), cuda, half) or "")
    assert "24" in (kernel.why_not(LayerShape(96, 32, 4, 24, True), cuda, half) or "")
    monkeypatch.setattr(triton_kernel, "_has_triton", lambda: False)
    assert kernel.why_not(shape, cuda, half) == "Triton is not installed"


def test_it_is_chosen_for_what_pytorchs_kernel_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_kernel, "_why_not_built", lambda device: None)
    choice = select_kernel(LayerShape(192, 64, 3, 64, True), torch.device("cuda"), torch.float16)
    assert choice.kernel.name == "triton"


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


@pytest.mark.parametrize(("kilobytes", "stages"), [(228, 3), (164, 2), (100, 2)])
def test_four_programs_fit_a_multiprocessor(monkeypatch: pytest.MonkeyPatch, kilobytes: int, stages: int) -> None:
    """Of Hopper, Ampere's A100, Ada: two steps of 16 KB of codes and 8 KB of rows under way, or one."""
    weight = prepare_packed(random_codes(4, 1088, 80, 128, symmetric=True), CPU)
    room = SimpleNamespace(shared_memory_per_multiprocessor=1024 * kilobytes, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: room)
    assert packed_blocks(weight, torch.device("meta"), False).stages == 3  # where nothing is known
    monkeypatch.setattr(blocks, "tuned_blocks", lambda *given: None)
    assert packed_blocks(weight, torch.device("cuda")).stages == stages


def test_a_gated_product_has_as_many_programs_and_no_more_shared_memory() -> None:
    plain = Blocks(outputs=64, inputs=128, splits=2, stages=3)
    assert gated_blocks(plain, 4096, 24576, packed=False) == Blocks(128, 64, 4, 3)
    assert gated_blocks(plain, 4096, 24576, packed=True) == Blocks(128, 128, 4, 2)
    assert gated_blocks(replace(plain, stages=2), 4096, 24576, packed=True).stages == 2
    assert gated_blocks(plain, 256, 24576, packed=True).splits == 2  # steps
    assert gated_blocks(plain, 4096, 151936, packed=True).splits == 1  # room for partial sums
    assert gated_blocks(replace(plain, outputs=128), 4096, 24576, packed=False) == replace(plain, outputs=128)


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


def test_every_shape_computes_the_same() -> None:
    weight = random_codes(4, 1088, 80, 128, symmetric=False)
    prepared = prepare_packed(weight, CPU)
    x = torch.randn(3, 1088, generator=torch.Generator().manual_seed(0)).half()
    exact = x.double() @ weight.dequantize().double().t()
    for outputs in (64, 128):
        for splits in (1, 2, 3):
            out = torch.full((3, 80), torch.nan, dtype=torch.float16)
            multiply_packed(x, prepared, out, blocks=Blocks(outputs, 512, splits, stages=3))
            assert relative_error(out, exact) < 1e-3, (outputs, splits)


@pytest.mark.parametrize("window", [None, 100])
def test_attention_does_not_depend_on_which_program_takes_what(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    """One program for all shares, some for several each, one for each; a bound of a share more, and of many."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 2000, 32, generator=generator).half()
    queries, position = torch.randn(3, 4, 32, generator=generator).half(), torch.tensor([330])
    found = []
    for count, bound in ((1, 384), (3, 384), (3, 2000), (100, 2000)):
        monkeypatch.setattr(attention, "multiprocessors", lambda device, count=count: count)
        workspace = shares.attention_workspace(CPU, 3, 4, 32, bound).fill_(torch.nan)
        found.append(torch.full((3, 128), torch.nan, dtype=torch.float16))
        attention.attend(queries, keys, values, position, window, workspace, found[-1], bound)
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert found[0].isfinite().all()


def _python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


def test_kernels_are_interpreted_although_triton_was_imported_before() -> None:
    code = """
import triton.language
from tests.helpers.interpret import interpret_on_cpu
interpret_on_cpu()
import torch
from quasar_core.kernels.triton.elementwise import rms_norm_residual
x = torch.randn(2, 64).half()
out = torch.empty_like(x)
rms_norm_residual(x, None, torch.ones(64).half(), 1e-6, out)
print(torch.allclose(out, torch.nn.functional.rms_norm(x, (64,)), atol=1e-2))
"""
    assert _python(code) == "True"


def test_choosing_a_kernel_imports_no_triton() -> None:
    code = """
import sys, torch
from quasar_core.errors import QuasarError
from quasar_core.kernels.base import LayerShape
from quasar_core.kernels.triton.adapters import TritonKernel
shape = LayerShape(64, 64, 4, 32, True)
print(TritonKernel().why_not(shape, torch.device("cpu"), torch.bfloat16), "triton" in sys.modules)
"""
    assert _python(code) == "it runs on CUDA, not on cpu False"
