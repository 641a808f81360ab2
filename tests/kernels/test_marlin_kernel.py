"""Marlin through gptqmodel: what it refuses, and what gptqmodel's module is given, by a stand-in for that module."""

import copy
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.packed_weights import make_weight

from quasar_core.checkpoint.gptq_format import QuantizedWeight, unpack_rows
from quasar_core.kernels import marlin
from quasar_core.kernels.base import LayerShape
from quasar_core.kernels.marlin import MarlinKernel
from quasar_core.kernels.select import KERNEL_NAMES, select_kernel
from quasar_core.kernels.times import _tensors, random_weight, shape_key, time_kernel

CPU, CUDA, BF16 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
LAYER = LayerShape(256, 128, bits=4, group_size=64, trivial_groups=True)


class StandInLinear(torch.nn.Module):
    """Has the parameters of gptqmodel's module, and multiplies by what they stand for, in its own words."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options, self.is_ready = options, False
        inputs, outputs, bits = (options[name] for name in ("in_features", "out_features", "bits"))
        groups = 1 if options["group_size"] == -1 else inputs // options["group_size"]
        sizes = {
            "qweight": (inputs * bits // 32, outputs),
            "qzeros": (groups, outputs * bits // 32),
            "scales": (groups, outputs),
            "g_idx": (inputs,),
        }
        for name, size in sizes.items():
            dtype = options["dtype"] if name == "scales" else torch.int32
            self.register_parameter(name, torch.nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False))

    def post_init(self) -> None:
        self.is_ready = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.is_ready
        codes = unpack_rows(self.qweight, self.options["bits"]).float() - 2 ** (self.options["bits"] - 1)
        weight = codes * self.scales.float()[self.g_idx.long()]
        return (x.float() @ weight).to(x.dtype)


@pytest.fixture
def gptqmodel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """gptqmodel in name, on an H200 in name; `error` is what keeps it from building its kernel."""
    linear, utils = ModuleType("gptqmodel.nn_modules.qlinear.marlin"), ModuleType("gptqmodel.utils.marlin")
    linear.MarlinLinear = StandInLinear  # type: ignore[attr-defined]
    utils.error = ""  # type: ignore[attr-defined]
    utils.marlin_runtime_error = lambda dtype: utils.error  # type: ignore[attr-defined]
    for module in (linear, utils):
        parts = module.__name__.split(".")
        for end in range(1, len(parts)):
            name = ".".join(parts[:end])
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(marlin, "_has_gptqmodel", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    marlin._why_not_built.cache_clear()
    yield utils
    marlin._why_not_built.cache_clear()


def symmetric_weight(bits: int, inputs: int, outputs: int, group_size: int) -> QuantizedWeight:
    weight = make_weight(bits, inputs, outputs, group_size)
    return replace(weight, zeros=torch.full_like(weight.zeros, 2 ** (bits - 1)))


@pytest.mark.usefixtures("gptqmodel")
@pytest.mark.parametrize(
    ("changes", "device", "dtype", "reason"),
    [
        ({}, CUDA, BF16, None),
        ({"bits": 8, "group_size": -1}, CUDA, torch.float16, None),
        ({}, CPU, BF16, "it runs on CUDA, not on cpu"),
        ({}, CUDA, torch.float32, "it takes bfloat16 and float16, not float32"),
        ({"trivial_groups": False}, CUDA, BF16, "its groups must be in order, and g_idx is not"),
        ({"symmetric": False}, CUDA, BF16, "its codes are asymmetric"),
        ({"bits": 3}, CUDA, BF16, "it takes 4 and 8 bits, not 3"),
        ({"group_size": 16}, CUDA, BF16, "it takes groups of 32, 64, 128 or a whole row, not 16"),
        ({"in_features": 192}, CUDA, BF16, "192 inputs are not a multiple of 128"),
        ({"out_features": 96}, CUDA, BF16, "96 outputs are not a multiple of 64"),
    ],
)
def test_it_says_what_it_cannot_run(
    changes: dict[str, Any], device: torch.device, dtype: torch.dtype, reason: str | None
) -> None:
    assert MarlinKernel().why_not(replace(LAYER, **changes), device, dtype) == reason


def test_it_says_what_is_missing_around_it(gptqmodel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gptqmodel.error = "nvcc is not found\nand more"
    assert MarlinKernel().why_not(LAYER, CUDA, BF16) == "gptqmodel cannot build it: nvcc is not found"
    monkeypatch.setattr(marlin, "_has_gptqmodel", lambda: False)
    assert MarlinKernel().why_not(LAYER, CUDA, BF16) == "gptqmodel is not installed"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert MarlinKernel().why_not(LAYER, CUDA, BF16) == "it needs compute capability 8.0"


@pytest.mark.usefixtures("gptqmodel")
@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (4, -1), (8, 128)])
def test_gptqmodel_is_given_the_checkpoints_tensors(bits: int, group_size: int) -> None:
    weight, kernel = symmetric_weight(bits, 256, 128, group_size), MarlinKernel()
    prepared: Any = kernel.prepare(weight, CPU, BF16)
    assert prepared.options == {
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": True,
        "in_features": 256,
        "out_features": 128,
        "bias": False,
        "dtype": BF16,
    }
    assert torch.equal(unpack_rows(prepared.qweight, bits), weight.codes)
    assert torch.equal(prepared.scales, weight.scales.to(BF16))
    assert torch.equal(prepared.g_idx, weight.g_idx)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).to(BF16)
    expected = x.float() @ weight.dequantize().t()
    assert (kernel.multiply(x, prepared).float() - expected).norm() < 2**-8 * expected.norm()


@pytest.mark.usefixtures("gptqmodel")
def test_it_is_measured_by_the_bytes_of_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = MarlinKernel().prepare(symmetric_weight(4, 256, 128, 64), CPU, BF16)
    assert sum(tensor.nbytes for tensor in _tensors(prepared)) > 256 * 128 // 2
    copies: list[Any] = []
    real = copy.deepcopy
    monkeypatch.setattr("quasar_core.kernels.times._UNCACHED", {"cpu": 100_000})  # five times the layer's bytes
    monkeypatch.setattr(copy, "deepcopy", lambda value: copies.append(value) or real(value))
    time_kernel(MarlinKernel(), LAYER, CPU, BF16)
    assert len(copies) == 4


@pytest.mark.usefixtures("gptqmodel")
def test_it_stands_after_tritons_and_runs_by_request() -> None:
    assert KERNEL_NAMES.index("marlin") == KERNEL_NAMES.index("triton") + 1
    assert select_kernel(LAYER, CUDA, BF16, "marlin").kernel.name == "marlin"


def test_the_shape_knows_whether_codes_are_symmetric() -> None:
    symmetric = symmetric_weight(4, 256, 128, 64)
    one_off = symmetric.zeros.clone()
    one_off[1, 7] += 1
    asymmetric = replace(symmetric, zeros=one_off)
    assert LayerShape.of(symmetric) == LAYER
    assert LayerShape.of(asymmetric) == replace(LAYER, symmetric=False)
    assert shape_key(LayerShape.of(symmetric)) == "256x128-4bit-g64"
    assert shape_key(LayerShape.of(asymmetric)) == "256x128-4bit-g64-asymmetric"
    for shape in (LAYER, replace(LAYER, symmetric=False)):
        assert LayerShape.of(random_weight(shape)) == shape
