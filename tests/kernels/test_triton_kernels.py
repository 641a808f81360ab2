"""Every Triton kernel against float64, in Triton's interpreter."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import interpreted  # noqa: F401  # first: it decides how kernels are compiled

from quasar_core.kernels.base import LayerShape
from quasar_core.kernels.select import select_kernel
from quasar_core.kernels.triton import adapters as triton_kernel
from quasar_core.kernels.triton import attention, blocks, shares, weights
from quasar_core.kernels.triton.adapters import TritonKernel
from quasar_core.kernels.triton.blocks import Blocks, gated_blocks, packed_blocks
from quasar_core.kernels.triton.packed import multiply_packed
from quasar_core.kernels.triton.unpack import dequantize_packed
from quasar_core.kernels.triton.weights import dequantize, prepare_packed
from tools.gpu_bench.cases import Case, random_codes, relative_error
from tools.gpu_bench.checks import correctness_cases

CPU = torch.device("cpu")
# Codes beside bfloat16 in one shape and in `slow`: the interpreter takes both types as float32. So each width once,
# symmetric or not, and of gates and experts 4 bits and 16; and what runs so in that shape not in float16 too.
SLOW = re.compile(
    r"(packed .* group (?!128)|packed (2|4) bits symmetric|packed (3|8) bits asymmetric|joined attention"
    r"|gated 8 bits|4 bits asymmetric, .* experts|8 bits, .* experts).* bfloat16"
    r"|(packed (2|4) bits asymmetric .* group 128|packed (3|8) bits symmetric .* group 128"
    r"|gated 4 bits .* splits 3|4 bits, .* experts .*) float16"
)
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


def test_nothing_is_interpreted_where_tests_of_a_gpu_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers.interpret import interpret_on_cpu

    monkeypatch.setenv("QUASAR_TEST_GPU", "1")
    with pytest.raises(pytest.skip.Exception):
        interpret_on_cpu()


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
