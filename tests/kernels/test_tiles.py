"""Products in AMX's tiles, on a processor that has them, or emulated: the bits that are promised, and the rules.

The code is the same, the compiler's for such a processor. Where these fail on one, and hold where its instructions are
emulated, it differs from its manual as `emulated_tiles.h` reads it.
"""

import ctypes
import mmap
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.packed_weights import make_weight

from quasar_core.kernels.cpu import build, forms, library, tile_permission, vnni
from quasar_core.kernels.cpu.compressed import CompressedWeight
from quasar_core.kernels.cpu.library import Product, load_library

CPU, HALF, FLOAT = torch.device("cpu"), torch.bfloat16, torch.float32
HELPERS = Path(__file__).parents[1] / "helpers"
KERNEL = vnni.VnniKernel()
COUNTS = (*range(1, 41), 47, 48, 49, 64, 65, 97, 150, 256)
CODES = 0  # of the kinds of products that emulated tiles count
# Inputs and outputs of bfloat16: whole and half tiles, a part of a strip, more inputs than are restored at a time.
SIZES = [(16, 1), (16, 16), (32, 5), (48, 33), (272, 16), (576, 40), (1040, 18)]
# Of codes: parts of a block, last groups that are filled up.
CODED_SIZES = [(128, 16), (33, 16), (17, 5), (200, 72), (384, 33)]
Multiply = Callable[..., torch.Tensor]


@pytest.fixture
def multiply(tiles: str, request: pytest.FixtureRequest) -> Multiply:
    """x times a weight of bfloat16, as it lies or in 12 bits."""
    home = request.getfixturevalue("_compiled") / library._key(library.SOURCE, "", forms.chosen())  # of these headers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "home", lambda: home)
        own = load_library(HELPERS / "multiply.cpp", {"multiply": [ctypes.c_void_p] * 3 + [ctypes.c_int] * 2})

    def product(x: torch.Tensor, weight: torch.Tensor | CompressedWeight, threads: int = 1) -> torch.Tensor:
        is_whole = isinstance(weight, torch.Tensor)
        place = weight.data_ptr() if is_whole else ctypes.addressof(weight.described)
        outputs, inputs = weight.shape if is_whole else (weight.out_features, weight.in_features)
        described = Product(place, None, 16 if is_whole else 12, inputs, outputs, 0, 0)
        x, y = x.contiguous(), torch.zeros(len(x), outputs)
        own.multiply(ctypes.byref(described), x.data_ptr(), y.data_ptr(), len(x), threads)
        return y

    return product


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_products_of_codes_have_the_bits_of_vnni(
    tiles: str, bits: int, group_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = CODED_SIZES[bits % 2 :: 2] if dtype == HALF else CODED_SIZES
    for number, (inputs, outputs) in enumerate(sizes):
        prepared = KERNEL.prepare(make_weight(bits, inputs, outputs, group_size), CPU, dtype)
        x = normal(256, inputs).to(dtype)
        monkeypatch.setenv(forms.VARIABLE, "avx512")
        expected = KERNEL.multiply(x, prepared)
        monkeypatch.setenv(forms.VARIABLE, "amx")
        for rows in COUNTS if number == 0 else (1, 8, 9, 16, 17, 33, 64, 97):
            torch.set_num_threads(1 + rows % 3)
            message = f"{rows} rows of {inputs} × {outputs}, groups of {prepared.group}, {tiles} tiles"
            assert torch.equal(KERNEL.multiply(x[:rows], prepared), expected[:rows]), message


@pytest.mark.parametrize(
    ("group", "rows", "row_tiles"),
    [(16, 64, 0), (32, 8, 0), (32, 9, 1), (64, 16, 1), (128, 16, 1), (128, 17, 2), (128, 64, 4), (128, 150, 10)],
)
def test_tiles_take_codes_from_nine_rows_on_in_groups_that_fill_them(
    tiles: str, tile_traps: ctypes.CDLL, group: int, rows: int, row_tiles: int
) -> None:
    """Each of so many tiles of rows with both halves of a block, 64 inputs at a time or a group's 32."""
    if tiles == "real":
        pytest.skip("only emulated tiles are counted")
    prepared = KERNEL.prepare(make_weight(4, 128, 32, group), CPU, FLOAT)
    before = tile_traps.tiles_multiplied(CODES)
    KERNEL.multiply(normal(rows, 128), prepared)
    assert tile_traps.tiles_multiplied(CODES) - before == row_tiles * 2 * (128 // min(group, 64))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("share", [0, 1])
def test_zeros_at_the_ends_have_the_bits_of_vnni(
    tiles: str, bits: int, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = make_weight(bits, 128, 32, 64)
    weight.zeros.fill_(share * 2**bits)
    prepared, x = KERNEL.prepare(weight, CPU, FLOAT), normal(20, 128)
    found = KERNEL.multiply(x, prepared)
    monkeypatch.setenv(forms.VARIABLE, "avx512")
    assert torch.equal(KERNEL.multiply(x, prepared), found)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row_of_codes(tiles: str, value: float) -> None:
    prepared = KERNEL.prepare(make_weight(4, 128, 32, 64), CPU, FLOAT)
    x = torch.ones(20, 128)
    x[13, 70] = value
    finite = KERNEL.multiply(x, prepared).isfinite()
    assert finite.all(dim=1).tolist() == [row != 13 for row in range(20)]
    assert not finite[13].any()


@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_products_of_bfloat16_are_close_and_a_row_depends_on_nothing_beside_it(
    multiply: Multiply, inputs: int, outputs: int
) -> None:
    weight, x = normal(outputs, inputs, seed=1).to(HALF), normal(256, inputs)
    expected = x.to(HALF).double() @ weight.double().t()
    whole = multiply(x, weight)
    assert float((whole - expected).abs().max()) < 1e-5 * inputs**0.5
    for rows in COUNTS[:-1]:
        assert torch.equal(multiply(x[:rows], weight, 1 + rows % 3), whole[:rows]), f"{rows} rows"
    for row in range(0, 256, 37):
        assert torch.equal(multiply(x[row : row + 1], weight), whole[row : row + 1])


@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_weights_in_12_bits_give_the_same_bits(multiply: Multiply, inputs: int, outputs: int) -> None:
    weight, x = normal(outputs, inputs, seed=2).to(HALF), normal(70, inputs)
    weight.view(-1)[:: max(outputs * inputs // 40, 7)] *= 2.0**40  # outliers, in every strip
    weight.view(-1)[3] = 0
    compressed = CompressedWeight.of(weight)
    assert len(compressed.outliers)
    for rows in (1, 2, 9, 16, 17, 40, 64, 70):
        assert torch.equal(multiply(x[:rows], compressed, 1 + rows % 2), multiply(x[:rows], weight))


def test_nothing_beyond_the_weights_is_multiplied(multiply: Multiply) -> None:
    """A row's last half tile, and a strip's last rows, stand in front of other memory, whose numbers would show."""
    memory = torch.full((40, 48), torch.nan, dtype=HALF)
    weight = memory.view(-1)[: 21 * 48].view(21, 48)
    weight[:] = normal(21, 48).to(HALF)
    assert multiply(normal(5, 48), weight).isfinite().all()
    assert torch.equal(multiply(normal(5, 48), weight), multiply(normal(5, 48), weight.clone()))


@pytest.mark.skipif(sys.platform != "linux", reason="pages are forbidden as Linux does it")
@pytest.mark.parametrize("bits", [16, 12])
def test_nothing_beyond_the_weights_is_read(multiply: Multiply, bits: int) -> None:
    """Behind a weight whose last strip has five outputs, and whose rows end with half a tile, is a page of nobody's."""
    pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    weight, x = normal(21, 48).to(HALF), normal(20, 48)

    def at_the_end(part: torch.Tensor, beyond: int) -> torch.Tensor:
        begin = mmap.PAGESIZE - part.nbytes + beyond
        place = memory[begin : begin + part.nbytes].view(part.dtype).view(part.shape)
        return place.copy_(part)

    def survives(beyond: int) -> bool:
        """Whether a fork multiplies with the weight that many bytes further on."""
        placed: torch.Tensor | CompressedWeight = at_the_end(weight, beyond)
        if bits == 12:
            own = CompressedWeight.of(weight)
            placed = CompressedWeight.at(21, 48, at_the_end(own.strips, beyond), own.bases, own.first, own.outliers)
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # to end without a word
            forbidden = ctypes.CDLL(None).mprotect(ctypes.c_void_p(memory.data_ptr() + mmap.PAGESIZE), mmap.PAGESIZE, 0)
            multiply(x, placed)
            os._exit(forbidden)
        return os.waitpid(child, 0)[1] == 0

    assert survives(0)
    assert not survives(32)


def test_a_tile_adds_even_and_odd_inputs_apart_and_takes_denormals_for_zero(multiply: Multiply, tiles: str) -> None:
    """32 inputs at a time, each product fused, as the manual has it; to the bit, but where a processor has the say."""
    weight, x = normal(16, 96, seed=3).to(HALF), normal(16, 96, seed=4)
    weight[5, 7], x[3, 9] = 1e-39, 1e-39
    weight[6], x[:, 64:] = 2.0**-70, 2.0**-70
    expected = in_the_manuals_order(x.to(HALF).double().numpy(), weight.double().numpy())
    found = multiply(x, weight).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 if tiles == "real" else 0)


def in_the_manuals_order(x: "np.ndarray", weight: "np.ndarray") -> "np.ndarray":
    """Sums [rows, outputs] in float32; products of bfloat16 are exact in float64."""

    def flushed(values: "np.ndarray") -> "np.ndarray":
        single = values.astype(np.float32)
        return np.where(np.abs(single) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), single), single)

    x, weight = flushed(x).astype(np.float64), flushed(weight).astype(np.float64)
    total = np.zeros((len(x), len(weight)), dtype=np.float32)
    for begin in range(0, x.shape[1], 32):
        parts = [np.zeros_like(total), np.zeros_like(total)]
        for i in range(begin, begin + 32):
            parts[i % 2] = flushed(parts[i % 2] + np.outer(x[:, i], weight[:, i]))
        total = flushed(total + flushed(parts[0] + parts[1]))
    return total


def test_every_thread_gives_its_tiles_back(multiply: Multiply, tiles: str, tile_traps: ctypes.CDLL) -> None:
    """Emulated threads that end with tiles end the program, as do products before a configuration."""
    if tiles == "real":
        pytest.skip("only emulated tiles tell")
    multiply(normal(20, 64), normal(40, 64).to(HALF), threads=3)
    KERNEL.multiply(normal(20, 64), KERNEL.prepare(make_weight(4, 64, 64, 32), CPU, FLOAT))
    assert tile_traps.tiles_multiplied(CODES)
    assert not tile_traps.tiles_are_configured()


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that breaks the rules of tiles."""
    compiler, form = build.find_compiler(), forms.find_form("amx")
    if compiler is None or platform.machine() != "x86_64" or sys.platform != "linux":
        pytest.skip("no C++ compiler for Linux on x86-64 was found")
    if not all(build._is_known(compiler, option) for option in form.options):
        pytest.skip("this compiler does not know AMX")
    if "amx_tile" in forms.instructions():
        pytest.skip("this processor may have tiles of its own")
    program = tmp_path_factory.mktemp("rules") / "rules"
    options = ["-std=c++17", *(option for option in form.options if option.startswith(("-mamx", "-mfma")))]
    subprocess.run([compiler, *options, str(HELPERS / "tile_rules.cpp"), "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (1, "a tile was named before tiles were configured"),
        (2, "a tile has rows without bytes or bytes without rows"),
        (3, "a tile has up to 16 rows of up to 64 bytes, in fours"),
        (4, "palette 1 and row 0 were expected"),
        (5, "the configuration leaves this tile out"),
        (6, "a tile was read that was neither loaded nor zeroed"),
        (7, "a tile was read that was neither loaded nor zeroed"),
        (8, "the factors of a product do not fit one another"),
        (9, "a product's columns are not those of its second factor"),
        (10, "a product takes three different tiles"),
        (11, "a thread ended without releasing its tiles"),
        (12, "tiles were released that were not configured"),
    ],
)
def test_emulated_tiles_end_a_program_that_breaks_a_rule(rules: Path, number: int, said: str) -> None:
    assert subprocess.run([rules, "0"]).returncode == 0
    done = subprocess.run([rules, str(number)], capture_output=True, text=True)
    assert (done.returncode < 0, done.stderr) == (True, f"emulated tiles: {said}\n")


class Linux:
    """A C library whose system answers as it is told."""

    def __init__(self, answer: int, number: int = 0) -> None:
        self.answer, self.number, self.asked = answer, number, list[list[int]]()

    def syscall(self, *arguments: ctypes.c_long) -> int:
        """Note what was asked."""
        self.asked.append([argument.value for argument in arguments])
        ctypes.set_errno(self.number)
        return self.answer


@pytest.mark.parametrize(
    ("linux", "said"),
    [
        (Linux(0), None),
        (Linux(-1, 95), "the system refuses AMX's tiles to this process (Operation not supported)"),
    ],
)
def test_the_system_is_asked_for_tiles(linux: Linux, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_permission.sys, "platform", "linux")
    monkeypatch.setattr(tile_permission.ctypes, "CDLL", lambda name, use_errno: linux)
    assert tile_permission.why_refused.__wrapped__() == said
    assert linux.asked == [[158, 0x1023, 18]]


def test_other_systems_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_permission.sys, "platform", "darwin")
    assert tile_permission.why_refused.__wrapped__() == "only Linux can be asked for AMX's tiles here"


def test_other_illegal_instructions_stay_so(rules: Path) -> None:
    assert subprocess.run([rules, "13"]).returncode == -signal.SIGILL


def test_a_processor_without_tiles_is_refused_by_this_system() -> None:
    if "amx_tile" in forms.instructions() or platform.machine() != "x86_64":
        pytest.skip("this processor may have them, or is another")
    assert tile_permission.why_refused() is not None
