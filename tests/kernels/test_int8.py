"""8-bit weights times 8-bit activations, in integers and in floating point, against products written out."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.packed_weights import make_weight

from quasar_core.checkpoint.compressed_tensors import FLOAT8, Float8Weight, concatenate_float8
from quasar_core.errors import UsageError
from quasar_core.kernels import eight_bit, select
from quasar_core.kernels.base import LayerShape
from quasar_core.kernels.eight_bit import Float8Kernel, Int8Kernel, quantize_rows_float8, quantize_rows_int8
from quasar_core.kernels.linear import PackedLinear
from quasar_core.kernels.select import select_kernel
from quasar_core.kernels.times import KernelFigures, random_weight, shape_key, time_kernel
from quasar_core.kernels.triton.adapters import TRITON_FLOAT8, TRITON_INT8
from quasar_core.quantize.solve.eight_bit import E4M3Format, Int8Format

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 64, 32), (3, 100, 24), (17, 256, 40)])
def test_an_integer_product_is_exact_but_for_the_rounded_rows(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    """Zeros other than 128 (other tools write them) included."""
    weight, x, kernel = make_weight(8, inputs, outputs, -1), random(rows, inputs).to(dtype), Int8Kernel()
    values, steps = quantize_rows_int8(x)
    expected = (values.double() * steps) @ weight.dequantize().double().t()
    y = kernel.multiply(x, kernel.prepare(weight, CPU, dtype))
    assert (y.dtype, y.shape) == (dtype, (rows, outputs))
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    assert (y.double() - expected).norm() < tolerance * expected.norm()
    whole = x.double() @ weight.dequantize().double().t()
    assert (y.double() - whole).norm() / whole.norm() < 0.03


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    kernel, x = Int8Kernel(), random(9, 96)
    prepared = kernel.prepare(make_weight(8, 96, 32, -1), CPU, torch.float32)
    whole = kernel.multiply(x, prepared)
    assert torch.equal(whole[4:5], kernel.multiply(x[4:5], prepared))


@pytest.mark.parametrize("inputs", [1, 256, 3000])
def test_integer_products_are_right_where_the_processors_are_wrong(
    inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As oneDNN's are without VNNI: sums are cut. The largest values, and random ones."""
    monkeypatch.setattr(torch, "_int_mm", lambda rows, values: (rows.int() @ values.int()).clamp(max=1 << 20))
    eight_bit.product_saturates.cache_clear()
    try:
        assert eight_bit.product_saturates()
        for name in ("auto", "int8"):
            assert "int8 multiplies in float32" in select_kernel(CODES, CPU, torch.float32, name).reason
        for high in (-127, 127):
            rows, values = torch.randint(-127, 128, (5, inputs)), torch.randint(-127, 128, (9, inputs))
            rows[0], values[:2] = high, 127
            found = eight_bit.integer_product(rows.to(torch.int8), values.to(torch.int8))
            assert torch.equal(found.long(), rows @ values.t())
    finally:
        eight_bit.product_saturates.cache_clear()


def test_rows_take_the_whole_range_and_zeros_stay() -> None:
    values, steps = quantize_rows_int8(torch.tensor([[0.0, 0.0], [-2.0, 1.0]]))
    assert values.tolist() == [[0, 0], [-127, 64]]
    assert steps[:, 0].tolist() == pytest.approx([0, 2 / 127])
    floats, steps = quantize_rows_float8(torch.tensor([[0.0, 0.0], [-2.0, 1.0]]))
    assert floats.float().tolist() == [[0, 0], [-448, 224]]


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (LayerShape(64, 32, 4, -1, True), "it runs on 8-bit codes, not on 4-bit ones"),
        (LayerShape(64, 32, 8, 32, True), "it runs on one scale per output, not on groups of 32"),
    ],
)
def test_what_the_integer_kernel_does_not_run(shape: LayerShape, reason: str) -> None:
    assert Int8Kernel().why_not(shape, CPU, torch.float32) == reason
    assert Int8Kernel().why_not(LayerShape(63, 31, 8, -1, False), CPU, torch.float32) is None


CODES = LayerShape(64, 32, 8, -1, True)
FLOATING = LayerShape(64, 32, 8, -1, True, floating=True)


def float8_weight(outputs: int = 32, inputs: int = 64) -> Float8Weight:
    return E4M3Format().round_weight(random(outputs, inputs, seed=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_floating_point_product(dtype: torch.dtype) -> None:
    """The values that the rows are rounded to, times the values that are stored; computed in float32 on the CPU."""
    weight, x = float8_weight(), random(5, 64).to(dtype)
    rows, steps = quantize_rows_float8(x)
    expected = (rows.double() * steps) @ weight.dequantize().double().t()
    layer = PackedLinear.build(weight, None, CPU, dtype, "float8")
    error = (layer(x).double() - expected).norm() / expected.norm()
    assert error < (1e-6 if dtype == torch.float32 else 4e-3)
    whole = x.double() @ weight.dequantize().double().t()
    assert (expected - whole).norm() / whole.norm() < 2**-4, "half a step of three bits behind the point"


def test_floating_point_weights_are_unpacked_where_no_unit_has_them() -> None:
    layer = PackedLinear.build(float8_weight(), None, CPU, torch.float32)
    assert layer.choice.kernel.name == "dense"
    assert layer.choice.reason.endswith("not float8: it runs on CUDA, not on cpu; so dequantized at load")
    assert torch.equal(layer.prepared, float8_weight().dequantize())
    assert select_kernel(FLOATING, CPU, torch.float32, "dense").reason == "asked for by --kernel"
    assert select_kernel(FLOATING, CPU, torch.float32, "float8").reason.endswith("computed in float32")
    with pytest.raises(UsageError, match="--kernel float8 cannot run this verifier: its weights are 8-bit codes"):
        select_kernel(LayerShape(64, 32, 8, -1, True), CPU, torch.float32, "float8")
    with pytest.raises(UsageError, match="--kernel vnni cannot run this verifier: its weights are 8-bit floating"):
        PackedLinear.build(float8_weight(), None, CPU, torch.float32, "vnni")


@pytest.mark.parametrize(
    ("capability", "dtype", "sizes", "reason"),
    [
        ((8, 0), torch.bfloat16, (64, 32), "it needs compute capability 8.9"),
        ((9, 0), torch.float16, (64, 32), "it takes bfloat16, not float16"),
        ((9, 0), torch.bfloat16, (72, 32), "72 × 32 are not multiples of 16"),
        ((8, 9), torch.bfloat16, (64, 32), None),
    ],
)
def test_which_gpus_multiply_floating_point(
    capability: tuple[int, int],
    dtype: torch.dtype,
    sizes: tuple[int, int],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(eight_bit.torch.cuda, "get_device_capability", lambda device: capability)
    shape = LayerShape(*sizes, 8, -1, True, floating=True)
    assert Float8Kernel().why_not(shape, torch.device("cuda"), dtype) == reason


@pytest.mark.parametrize(
    ("changes", "capability", "reason"),
    [
        ({}, (8, 0), None),
        ({}, (7, 5), "it needs compute capability 8.0"),
        ({"bits": 4}, (9, 0), "it runs on 8-bit codes, not on 4-bit ones"),
        ({"group_size": 32}, (9, 0), "it runs on one scale per output, not on groups of 32"),
        ({"symmetric": False}, (9, 0), "it takes symmetric codes"),
        ({"in_features": 72}, (9, 0), "72 × 32 are not multiples of 16"),
        ({"floating": True}, (8, 0), "it needs compute capability 8.9"),
        ({"floating": True}, (8, 9), None),
    ],
)
def test_what_tritons_products_in_8_bits_take(
    changes: dict[str, Any], capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    shape = replace(LayerShape(64, 32, 8, -1, True), **changes)
    kernel = TRITON_FLOAT8 if shape.floating else TRITON_INT8
    monkeypatch.setattr("quasar_core.kernels.triton.adapters._has_triton", lambda: True)
    monkeypatch.setattr("quasar_core.kernels.triton.adapters._why_not_built", lambda device: None)
    assert kernel.why_not(shape, torch.device("cuda"), torch.bfloat16) == reason
    assert kernel.why_not(shape, CPU, torch.bfloat16) == "it runs on CUDA, not on cpu"


def test_products_of_floating_point_compete(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the time of their own shape, and not by that of 8-bit codes of the same sizes."""
    shape = LayerShape(512, 256, 8, -1, True, floating=True)
    assert isinstance(random_weight(shape), Float8Weight)
    assert bool(random_weight(shape).dequantize().isfinite().all())
    assert set(time_kernel(Float8Kernel(), shape, CPU, torch.float32)) == {1, 4, 8}
    for kernel in select.FLOATING_KERNELS:
        monkeypatch.setattr(kernel, "why_not", lambda *given: None)
    seconds = {"triton-float8": 10e-6, "float8": 12e-6, "dense": 20e-6}
    asked: list[str] = []

    class Times:
        def of(self, kernels: Any, shape: LayerShape, progress: Any) -> KernelFigures:
            asked.append(shape_key(shape))
            return KernelFigures({kernel.name: dict.fromkeys((1, 4, 8), seconds[kernel.name]) for kernel in kernels})

    monkeypatch.setattr(select, "kernel_times", lambda device, dtype: Times())
    choice = select_kernel(shape, CPU, torch.bfloat16)
    assert choice.kernel is TRITON_FLOAT8
    assert choice.reason == "fastest of 3 for 512 → 256: 10 µs at 4 rows, float8 12, dense 20"
    assert asked == ["512x256-8bit-g-1-floating"]


def test_layers_of_one_input_are_joined() -> None:
    first, second = float8_weight(16), float8_weight(48)
    joined = concatenate_float8([first, second])
    assert torch.equal(joined.dequantize(), torch.cat([first.dequantize(), second.dequantize()]))
    assert joined.values.dtype == FLOAT8


@pytest.mark.parametrize("number", [Int8Format(), E4M3Format()], ids=["int8", "float8"])
def test_weights_round_to_their_grid(number: Int8Format | E4M3Format) -> None:
    """Half a step of an integer, a sixteenth of a floating-point number; scales that every 16-bit dtype holds."""
    weight = random(24, 100) * torch.logspace(-3, 3, 24)[:, None]
    weight[3] = 0
    rounded = number.round_weight(weight)
    error, largest = (rounded.dequantize() - weight).abs(), weight.abs().amax(dim=1)
    if isinstance(number, Int8Format):
        bound = (0.51 * largest / 127 + 0.004 * largest)[:, None].expand_as(error)
    else:
        bound = torch.maximum(weight.abs() / 15, (largest / 448 / 64)[:, None]) + 0.004 * largest[:, None]
    assert bool((error[weight.abs().amax(dim=1) > 0] <= bound[weight.abs().amax(dim=1) > 0]).all())
    assert bool((rounded.dequantize()[3] == 0).all())
    scales = rounded.scales.float()
    assert torch.equal(scales.to(torch.bfloat16).float(), scales)
