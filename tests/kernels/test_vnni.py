"""The 8-bit product: its error, its rows, its threads, and what becomes of a machine where it cannot be built."""

import ctypes
import stat
import statistics
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers.packed_weights import make_weight, symmetric

from quasar_core.errors import QuasarError
from quasar_core.kernels import select
from quasar_core.kernels.base import LayerShape
from quasar_core.kernels.cpu import library, vnni
from quasar_core.kernels.cpu import library as compiling
from quasar_core.kernels.select import select_kernel

CPU = torch.device("cpu")
KERNEL = vnni.VnniKernel()
COMMON = LayerShape(256, 64, bits=4, group_size=64, trivial_groups=True)
usable = pytest.mark.usefixtures("cpp_pass")
each_form = pytest.mark.usefixtures("form")
DTYPES = [torch.float32, torch.bfloat16]
# in, out: one block of outputs, several, a part of one; steps of 16, 32, 64 and 128 inputs; short last groups, of any
# number of inputs.
SIZES = [
    (128, 16),
    (72, 48),
    (200, 32),
    (33, 16),
    (17, 5),
    (256, 48),
    (384, 80),
    (160, 32),
    (96, 96),
    (32, 128),
    (48, 33),
    (1024, 72),
]


def relative_error(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.double() - exact.double()).norm() / exact.double().norm())


@usable
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_products_of_1_to_17_rows(bits: int, group_size: int, dtype: torch.dtype) -> None:
    """Against the weight written out, symmetric and not; a few outputs whose terms cancel may err by more than most."""
    for in_features, out_features in SIZES:
        stored = make_weight(bits, in_features, out_features, group_size)
        x = torch.randn(17, in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
        for weight in (stored, symmetric(stored)):
            exact = x.float() @ weight.dequantize().t()
            prepared = KERNEL.prepare(weight, CPU, dtype)
            for rows in range(1, 18):
                y = KERNEL.multiply(x[:rows], prepared)
                assert (y.dtype, y.shape) == (dtype, (rows, out_features))
                assert relative_error(y, exact[:rows]) < 0.03, f"{rows} rows of {in_features} × {out_features}"


@usable
@pytest.mark.parametrize("bits", [4, 8])
def test_the_error_on_a_common_layer_is_what_the_docstring_says(bits: int) -> None:
    errors = []
    for seed in range(5):
        weight = symmetric(make_weight(bits, 1024, 512, 128, seed))
        x = torch.randn(16, 1024, generator=torch.Generator().manual_seed(seed))
        exact = x.double() @ weight.dequantize().double().t()
        errors.append(relative_error(KERNEL.multiply(x, KERNEL.prepare(weight, CPU, x.dtype)), exact))
    assert statistics.mean(errors) < 0.008


@each_form
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_that_8_bits_hold_are_multiplied_exactly(bits: int) -> None:
    """Activations that are multiples of their step leave no rounding, so every code and zero is in its place."""
    weight = make_weight(bits, 192, 40, 64)
    weight.scales.fill_(0.5)
    x = torch.randint(-127, 128, (5, 192), generator=torch.Generator().manual_seed(3)).float()
    x[:, ::16] = 127
    assert torch.equal(KERNEL.multiply(x, KERNEL.prepare(weight, CPU, x.dtype)), x @ weight.dequantize().t())


@usable
@pytest.mark.parametrize("zero", [0, 16])
def test_zeros_at_the_ends_that_other_tools_write(zero: int) -> None:
    weight = make_weight(4, 128, 32, 32)
    weight.zeros.fill_(zero)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(4))
    error = relative_error(KERNEL.multiply(x, KERNEL.prepare(weight, CPU, x.dtype)), x @ weight.dequantize().t())
    assert error < 0.02


@each_form
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype: torch.dtype) -> None:
    """Bit for bit, whatever the tile and the chunk that it falls into."""
    weight = make_weight(4, 256, 48, 64)
    prepared = KERNEL.prepare(weight, CPU, dtype)
    x = torch.randn(150, 256, generator=torch.Generator().manual_seed(5)).to(dtype)
    alone = torch.cat([KERNEL.multiply(row[None], prepared) for row in x])
    for rows in (*range(2, 18), 64, 65, 150):
        assert torch.equal(KERNEL.multiply(x[:rows], prepared), alone[:rows])


@each_form
def test_threads_change_nothing() -> None:
    weight = make_weight(4, 256, 200, 128)
    prepared = KERNEL.prepare(weight, CPU, torch.float32)
    x = torch.randn(9, 256, generator=torch.Generator().manual_seed(6))
    products = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        products.append(KERNEL.multiply(x, prepared))
    assert torch.equal(products[0], products[1])
    assert torch.equal(products[0], products[2])


@each_form
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_so(value: float, dtype: torch.dtype) -> None:
    weight = make_weight(4, 128, 32, 64)
    x = torch.ones(3, 128, dtype=dtype)
    x[1, 70] = value
    y = KERNEL.multiply(x, KERNEL.prepare(weight, CPU, dtype))
    assert y.isfinite().all(dim=1).tolist() == [True, False, True]
    assert not y[1].isfinite().any()


@usable
def test_rows_of_zeros_no_rows_and_rows_that_are_not_contiguous() -> None:
    weight = make_weight(4, 64, 32, 32)
    prepared = KERNEL.prepare(weight, CPU, torch.float32)
    assert not KERNEL.multiply(torch.zeros(2, 64), prepared).any()
    assert KERNEL.multiply(torch.zeros(0, 64), prepared).shape == (0, 32)
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(7)).t()
    assert torch.equal(KERNEL.multiply(x, prepared), KERNEL.multiply(x.contiguous(), prepared))


@usable
def test_codes_take_their_bits_and_a_sixteenth_more() -> None:
    prepared = KERNEL.prepare(make_weight(4, 1024, 64, 128), CPU, torch.bfloat16)
    assert prepared.stream.numel() == 1024 * 64 // 2 + 1024 * 64 // 128 * 4
    assert prepared.stream.data_ptr() % 64 == 0


@usable
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_it_is_the_first_choice_on_the_cpu(bits: int, dtype: torch.dtype) -> None:
    choice = select_kernel(LayerShape(256, 72, bits, 64, True), CPU, dtype)
    assert choice.kernel.name == "vnni"


@pytest.mark.parametrize(
    ("shape", "device", "dtype", "reason"),
    [
        (COMMON, "cuda", torch.bfloat16, "it runs on the CPU, not on cuda"),
        (COMMON, "cpu", torch.float16, "it takes bfloat16 and float32, not float16"),
        (LayerShape(256, 64, 4, 64, False), "cpu", torch.float32, "its groups must be in order, and g_idx is not"),
        (
            LayerShape(72, 64, 4, 24, True),
            "cpu",
            torch.float32,
            "groups of 24 do not divide into sixteens",
        ),
    ],
)
def test_what_it_does_not_run(shape: LayerShape, device: str, dtype: torch.dtype, reason: str) -> None:
    assert KERNEL.why_not(shape, torch.device(device), dtype) == reason


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is known of this machine yet; afterwards all that was known is."""
    for name in ("_library_in", "_why_not_in"):
        monkeypatch.setattr(library, name, cache(getattr(library, name).__wrapped__))
    monkeypatch.delenv(compiling.SWITCH, raising=False)
    return tmp_path


def pretend_compiler(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that stands where the compiler stands."""
    program = folder / "pretended"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(program))


def test_no_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "PACKED_KERNELS", (KERNEL,))
    monkeypatch.setenv("CXX", str(fresh / "nowhere"))
    assert select_kernel(COMMON, CPU, torch.bfloat16).reason.startswith("not vnni: no C++ compiler was found")


def test_a_build_that_fails_is_a_reason_and_leaves_nothing(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "PACKED_KERNELS", (KERNEL,))
    pretend_compiler(fresh, "echo 'note' >&2; echo 'x.h: error: not here' >&2; exit 1", monkeypatch)
    reason = KERNEL.why_not(COMMON, CPU, torch.float32)
    assert reason is not None
    assert reason.endswith("could not compile quasar.cpp: x.h: error: not here")
    assert [path.suffix for path in (fresh / "home").rglob("*") if path.is_file()] == [".lock"]


def test_a_library_that_does_not_load_is_a_reason(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "PACKED_KERNELS", (KERNEL,))
    pretend_compiler(fresh, 'for last; do :; done; echo "no library" > "$last"', monkeypatch)
    reason = KERNEL.why_not(COMMON, CPU, torch.float32)
    assert reason is not None
    assert reason.startswith("its library could not be loaded: ")


def test_a_home_that_cannot_be_written_is_a_reason(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "home").write_text("a file")
    pretend_compiler(fresh, "exit 0", monkeypatch)
    with pytest.raises(QuasarError, match="its library could not be written to "):
        compiling.shared_library(library.SOURCE)


@pytest.mark.skipif(compiling.find_compiler() is None, reason="no C++ compiler was found")
def test_a_library_is_compiled_once_and_anew_when_its_source_changes(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fresh / "seven.cpp"
    source.write_text('extern "C" int seven() { return 7; }\n')
    library = compiling.shared_library(source)
    assert ctypes.CDLL(str(library)).seven() == 7
    built = library.stat().st_mtime_ns
    assert compiling.shared_library(source) == library
    assert library.stat().st_mtime_ns == built
    source.write_text('extern "C" int seven() { return 8; }\n')
    assert compiling.shared_library(source) != library


@usable
def test_a_weight_is_brought_into_order_some_blocks_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = make_weight(4, 96, 200, 32)  # seven blocks, the last of them not full
    whole = KERNEL.prepare(weight, CPU, torch.bfloat16)
    monkeypatch.setattr(vnni, "_AT_ONCE", 2)
    assert torch.equal(KERNEL.prepare(weight, CPU, torch.bfloat16).stream, whole.stream)
