"""Every kernel against the weight written out in float64; which one is chosen, and why."""

import pytest
import torch
from helpers.packed_weights import make_weight, symmetric

from quasar_core.checkpoint.gptq_format import QuantizedWeight
from quasar_core.errors import UsageError
from quasar_core.kernels import select
from quasar_core.kernels.base import Kernel, LayerShape
from quasar_core.kernels.linear import PackedLinear
from quasar_core.kernels.select import KERNELS, select_kernel
from quasar_core.kernels.triton import adapters as triton_kernel

CPU = torch.device("cpu")
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
# Relative error of a product, by dtype: a bfloat16 has 8 bits, and so has a scale or a zero that is rounded to it.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
# These round their input to 8 bits: test_vnni.py and test_int8.py hold them to what that costs.
PRECISE = [kernel for kernel in KERNELS if kernel.name not in ("vnni", "int8")]
PRECISE_NAMES = [kernel.name for kernel in PRECISE]
SIZES = [(128, 16), (256, 48), (384, 80), (160, 32), (96, 96), (32, 128)]  # in, out


@pytest.fixture
def no_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without AVX-512 VNNI."""
    kernels = tuple(kernel for kernel in select.PACKED_KERNELS if kernel.name != "vnni")
    monkeypatch.setattr(select, "PACKED_KERNELS", kernels)


def check(kernel: Kernel, weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> None:
    """Products of few to 17 rows within the tolerance of the dtype."""
    x = torch.randn(17, weight.in_features, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    exact = x.double() @ weight.dequantize().double().t().to(device)
    prepared = kernel.prepare(weight, device, dtype)
    for rows in (1, 2, 3, 4, 5, 8, 9, 16, 17):
        y = kernel.multiply(x[:rows], prepared)
        assert (y.dtype, y.shape) == (dtype, (rows, weight.out_features))
        error = (y.double() - exact[:rows]).norm() / exact[:rows].norm()
        assert error < TOLERANCE[dtype], f"{rows} rows of {weight.in_features} × {weight.out_features}: {error:.1e}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kernel", PRECISE, ids=PRECISE_NAMES)
@pytest.mark.parametrize("on", DEVICES)
def test_products(on: str, kernel: Kernel, bits: int, group_size: int, dtype: torch.dtype) -> None:
    """Symmetric and not, on sizes that are no powers of two and whose last group may be short."""
    checked, device = 0, torch.device(on)
    for in_features, out_features in SIZES:
        weight = make_weight(bits, in_features, out_features, group_size)
        if kernel.why_not(LayerShape.of(weight), device, dtype) is None:
            check(kernel, weight, device, dtype)
            check(kernel, symmetric(weight), device, dtype)
            checked += 1
    if not checked:
        pytest.skip(f"{kernel.name} runs no {bits}-bit layer in groups of {group_size} here")


@pytest.mark.parametrize("kernel", PRECISE, ids=PRECISE_NAMES)
@pytest.mark.parametrize("zero", [0, 16])
def test_zeros_at_the_ends_that_other_tools_write(kernel: Kernel, zero: int) -> None:
    """A zero of 0 (version 2) or of 2^bits (version 1, stored as 2^bits − 1)."""
    weight = make_weight(4, 128, 32, 32)
    weight.zeros.fill_(zero)
    dtype = torch.float32 if kernel.name in ("dense", "reference") else torch.bfloat16
    if kernel.why_not(LayerShape.of(weight), CPU, dtype):
        pytest.skip(f"{kernel.name} does not run on the CPU")
    check(kernel, weight, CPU, dtype)


@pytest.mark.parametrize("name", ["dense", "reference"])
def test_groups_that_are_not_in_order(name: str) -> None:
    weight = make_weight(4, 128, 32, 32)
    shuffled = weight.g_idx[torch.randperm(128, generator=torch.Generator().manual_seed(0))]
    weight = QuantizedWeight(4, 32, weight.codes, weight.scales, weight.zeros, shuffled)
    kernel = select_kernel(LayerShape.of(weight), CPU, torch.float32, name).kernel
    check(kernel, weight, CPU, torch.float32)


@pytest.mark.usefixtures("no_vnni")
def test_the_cpu_prefers_int4_and_says_nothing_against_the_gpus_kernel() -> None:
    choice = select_kernel(LayerShape(256, 64, 4, 64, True), CPU, torch.bfloat16)
    assert (choice.kernel.name, choice.reason) == (
        "torch-int4-cpu",
        "the first choice for layers too small to be measured",
    )


@pytest.mark.usefixtures("no_vnni")
def test_float32_is_unpacked_as_no_packed_product_is_fast_there() -> None:
    choice = select_kernel(LayerShape(256, 64, 4, 64, True), CPU, torch.float32)
    assert choice.kernel.name == "dense"
    assert choice.reason == "not torch-int4-cpu: it is fast in bfloat16 alone, not in float32; so dequantized at load"


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (LayerShape(256, 64, 3, 64, True), "not torch-int4-cpu: it takes 4-bit codes, not 3-bit"),
        (LayerShape(256, 72, 4, 64, True), "not torch-int4-cpu: 72 outputs are not a multiple of 16"),
        (LayerShape(96, 64, 4, -1, True), "not torch-int4-cpu: it takes groups of 32, 64, 128, 256, not 96"),
        (LayerShape(96, 64, 4, 64, True), "not torch-int4-cpu: 96 inputs are not a multiple of the group size 64"),
        (LayerShape(256, 64, 4, 64, False), "not torch-int4-cpu: its groups must be in order, and g_idx is not"),
    ],
)
@pytest.mark.usefixtures("no_vnni")
def test_what_int4_cannot_run_is_unpacked_at_load_with_the_reason(shape: LayerShape, reason: str) -> None:
    choice = select_kernel(shape, CPU, torch.bfloat16)
    assert (choice.kernel.name, choice.reason) == ("dense", f"{reason}; so dequantized at load")


@pytest.mark.parametrize(
    ("capability", "dtype", "shape", "name", "reason"),
    [
        ((9, 0), torch.bfloat16, LayerShape(256, 64, 4, 64, True), "torch-int4-cuda", "too small to be measured"),
        ((7, 5), torch.bfloat16, LayerShape(256, 64, 4, 64, True), "dense", "it needs compute capability 8.0"),
        ((9, 0), torch.float16, LayerShape(256, 64, 4, 64, True), "dense", "it takes bfloat16, not float16"),
        ((9, 0), torch.bfloat16, LayerShape(192, 64, 4, 64, True), "dense", "192 is not a multiple of 8 × 128"),
    ],
)
def test_the_choice_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    shape: LayerShape,
    name: str,
    reason: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(triton_kernel, "_has_triton", lambda: False)
    choice = select_kernel(shape, torch.device("cuda"), dtype)
    assert choice.kernel.name == name
    assert reason in choice.reason


@pytest.mark.parametrize("name", ["dense", "reference", "torch-int4-cpu"])
def test_a_requested_kernel_is_taken(name: str) -> None:
    choice = select_kernel(LayerShape(256, 64, 4, 64, True), CPU, torch.bfloat16, name)
    assert (choice.kernel.name, choice.reason) == (name, "asked for by --kernel")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("exllama", "--kernel must be one of auto, .*marlin, .*reference, .*float8, not exllama"),
        ("torch-int4-cuda", "--kernel torch-int4-cuda cannot run this verifier: it runs on CUDA, not on cpu"),
        ("torch-int4-cpu", "--kernel torch-int4-cpu cannot run this verifier: it takes 4-bit codes, not 8-bit"),
    ],
)
def test_a_requested_kernel_that_cannot_run_is_refused(name: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        select_kernel(LayerShape(256, 64, 8, 64, True), CPU, torch.bfloat16, name)


def test_a_packed_linear_keeps_leading_dimensions_and_adds_its_bias() -> None:
    weight = make_weight(4, 64, 16, 32)
    bias = torch.arange(16.0)
    layer = PackedLinear.build(weight, bias, CPU, torch.float32, "dense")
    x = torch.randn(2, 3, 64)
    assert torch.allclose(layer(x), x @ weight.dequantize().t() + bias, atol=1e-5)
    assert "64 → 16, 4 bits, dense" in str(layer)
