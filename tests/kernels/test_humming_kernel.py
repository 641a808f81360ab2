"""Humming through humming-kernels: what it refuses, and what its layer is given, by a stand-in for that layer."""

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.packed_weights import make_weight

from quasar_core.checkpoint.gptq_format import unpack_rows
from quasar_core.kernels import humming
from quasar_core.kernels.base import LayerShape
from quasar_core.kernels.humming import HummingKernel
from quasar_core.kernels.select import KERNEL_NAMES, select_kernel

CPU, CUDA, BF16, HALF = torch.device("cpu"), torch.device("cuda"), torch.bfloat16, torch.float16
LAYER = LayerShape(256, 128, bits=4, group_size=64, trivial_groups=True)


class StandInLayer(torch.nn.Module):
    """Has the parameters of the package's layer for GPTQ's tensors, and multiplies by what they stand for."""

    def __init__(self, shape_n: int, shape_k: int, weight_config: dict[str, Any], torch_dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.is_ready, bits = weight_config, False, weight_config["bits"]
        groups = shape_k // weight_config["group_size"]
        sizes = {
            "qweight": (shape_k * bits // 32, shape_n),
            "scales": (groups, shape_n),
            "qzeros": (groups, shape_n * bits // 32),
            "g_idx": (shape_k,),
        }
        for name, size in sizes.items():
            dtype = torch_dtype if name == "scales" else torch.int32
            self.register_parameter(name, torch.nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False))

    def load_from_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.load_state_dict(tensors, strict=False)

    def transform(self) -> None:
        self.is_ready = True

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        assert self.is_ready
        codes = unpack_rows(self.qweight, self.config["bits"]).float() - 2 ** (self.config["bits"] - 1)
        weight = codes * self.scales.float().repeat_interleave(self.config["group_size"], 0)
        return (inputs.float() @ weight).to(inputs.dtype)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Any:
    """humming-kernels in name, on a T4 or whatever `capability` says, in name."""
    layer = ModuleType("humming.layer")
    layer.HummingLayer, layer.capability = StandInLayer, (9, 0)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "humming", ModuleType("humming"))
    monkeypatch.setitem(sys.modules, "humming.layer", layer)
    monkeypatch.setattr(humming, "_has_humming", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: layer.capability)
    monkeypatch.setattr(humming, "_why_not_built", lambda device, dtype: None)
    return layer


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("changes", "device", "dtype", "reason"),
    [
        ({}, CUDA, BF16, None),
        ({"bits": 8, "group_size": -1}, CUDA, HALF, None),
        ({}, CPU, BF16, "it runs on CUDA, not on cpu"),
        ({}, CUDA, torch.float32, "it takes bfloat16 and float16, not float32"),
        ({"trivial_groups": False}, CUDA, BF16, "its groups must be in order, and g_idx is not"),
        ({"symmetric": False}, CUDA, BF16, "its codes are asymmetric"),
        ({"bits": 3}, CUDA, BF16, "it takes 4 and 8 bits, not 3"),
        ({"out_features": 96}, CUDA, BF16, "96 outputs are not a multiple of 64"),
    ],
)
def test_it_says_what_it_cannot_run(
    changes: dict[str, Any], device: torch.device, dtype: torch.dtype, reason: str | None
) -> None:
    assert HummingKernel().why_not(replace(LAYER, **changes), device, dtype) == reason


def test_it_runs_on_turing_in_float16(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, package.capability = HummingKernel(), (7, 5)
    assert kernel.why_not(LAYER, CUDA, HALF) is None
    assert kernel.why_not(LAYER, CUDA, BF16) == "it needs compute capability 8.0"
    package.capability = (7, 0)
    assert kernel.why_not(LAYER, CUDA, HALF) == "it needs compute capability 7.5"
    package.capability = (9, 0)
    monkeypatch.setattr(humming, "_has_humming", lambda: False)
    assert kernel.why_not(LAYER, CUDA, HALF) == "humming-kernels is not installed"


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (4, -1), (8, 128)])
def test_the_package_is_given_the_checkpoints_tensors(bits: int, group_size: int) -> None:
    weight, kernel = make_weight(bits, 256, 128, group_size), HummingKernel()
    weight = replace(weight, zeros=torch.full_like(weight.zeros, 2 ** (bits - 1)))
    prepared = kernel.prepare(weight, CPU, BF16)
    size = 256 if group_size == -1 else group_size
    assert prepared.config == {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": True}
    assert torch.equal(unpack_rows(prepared.qweight, bits), weight.codes)
    assert torch.equal(prepared.scales, weight.scales.to(BF16))
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).to(BF16)
    expected = x.float() @ weight.dequantize().t()
    assert (kernel.multiply(x, prepared).float() - expected).norm() < 2**-8 * expected.norm()


def test_one_small_product_decides_whether_it_is_built(monkeypatch: pytest.MonkeyPatch, package: Any) -> None:
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "humming", ModuleType("humming"))
    monkeypatch.setitem(sys.modules, "humming.layer", package)
    asked = humming._why_not_built.__wrapped__
    assert asked(CPU, BF16) is None

    def fail(self: StandInLayer, inputs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("nvcc is not found\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(StandInLayer, "forward", fail)
        assert asked(CPU, BF16) == "humming-kernels cannot build it: nvcc is not found"
        patch.setattr(StandInLayer, "forward", lambda self, inputs: inputs[:, :128])
        assert asked(CPU, BF16) == "a kernel of it computes wrongly here"


@pytest.mark.usefixtures("package")
def test_it_stands_after_marlin_and_runs_by_request() -> None:
    assert KERNEL_NAMES.index("humming") == KERNEL_NAMES.index("marlin") + 1
    assert select_kernel(LAYER, CUDA, BF16, "humming").kernel.name == "humming"
