"""Humming (vLLM project, 2026) on CUDA, as the humming-kernels package builds and calls it; from Turing on.

The package is imported once a layer on this device is found to fit, and never before: it compiles a kernel for a shape
when that is first met. Which kernel serves a number of rows is its own choice, so that a row's last bits may depend on
the rows beside it. Letters: T rows of a pass, in and out the layer's sizes.
"""

import sys
from contextlib import redirect_stdout
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

from quasar_core.checkpoint.gptq_format import QuantizedWeight, trivial_groups
from quasar_core.checkpoint.headers import why_not_marlin
from quasar_core.kernels.base import LayerShape
from quasar_core.kernels.gpu import AMPERE, first_line, on, raise_if_lost, why_not_nvidia

_TURING = (7, 5)  # in float16; bfloat16 begins with Ampere
_TRIED = LayerShape(256, 128, bits=4, group_size=64, trivial_groups=True)
_LARGEST_ERROR = 0.02  # of the norm of a product: some roundings to 8 bits of mantissa


class HummingKernel:
    """Its `HummingLayer` on GPTQ's tensors: symmetric codes of 4 and 8 bits; scales rounded to the products' dtype."""

    name = "humming"

    def why_not(self, shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
        """Ordered groups, sizes of whole tiles, float16 from Turing on and bf16 from Ampere on."""
        obstacle = why_not_nvidia(device, AMPERE if dtype == torch.bfloat16 else _TURING)
        if obstacle:
            return obstacle
        if dtype not in (torch.bfloat16, torch.float16):
            return f"it takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
        if not shape.trivial_groups:
            return "its groups must be in order, and g_idx is not"
        obstacle = why_not_marlin(shape, shape.symmetric)  # of these sizes it takes all; of others it was not tried
        if obstacle:
            return obstacle
        return _why_not_built(device, dtype) if _has_humming() else "humming-kernels is not installed"

    def prepare(self, weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> Any:
        """The checkpoint's own tensors, which the package reorders on the device."""
        from humming.layer import HummingLayer

        size = weight.in_features if weight.group_size == -1 else weight.group_size  # it divides by it
        with on(device):
            layer: Any = HummingLayer(
                shape_n=weight.out_features,
                shape_k=weight.in_features,
                weight_config={"quant_method": "gptq", "bits": weight.bits, "group_size": size, "sym": True},
                torch_dtype=dtype,
            )
            layer.load_from_tensors(weight.pack())
            layer.to(device)
            layer.transform()
        return layer

    def multiply(self, x: torch.Tensor, prepared: Any) -> torch.Tensor:
        """x [T, in] → [T, out], sums in float32."""
        with on(x.device):
            product: torch.Tensor = prepared(x.contiguous())
        return product


@cache
def _has_humming() -> bool:
    try:
        version("humming-kernels")  # another package may bear the module's name
    except PackageNotFoundError:
        return False
    return find_spec("humming") is not None


@cache
def _why_not_built(device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps the package from building a kernel, or what the kernel computes wrongly; None where it is right."""
    kernel, generator = HummingKernel(), torch.Generator().manual_seed(0)
    weight = _random_weight(generator)
    x = torch.randn(3, _TRIED.in_features, generator=generator).to(dtype)
    try:
        with redirect_stdout(sys.stderr):  # a compiler's own lines
            product = kernel.multiply(x.to(device), kernel.prepare(weight, device, dtype)).cpu().float()
    except Exception as error:  # of a compiler, the loader, the package: each is a reason
        raise_if_lost(error)
        return f"humming-kernels cannot build it: {first_line(error)}"
    exact = x.float() @ weight.dequantize().t()
    is_right = float((product - exact).norm()) <= _LARGEST_ERROR * float(exact.norm())
    return None if is_right else "a kernel of it computes wrongly here"


def _random_weight(generator: torch.Generator) -> QuantizedWeight:
    shape, middle = _TRIED, 2 ** (_TRIED.bits - 1)
    codes = torch.randint(2**shape.bits, (shape.in_features, shape.out_features), generator=generator)
    scales = 0.1 + torch.rand(shape.in_features // shape.group_size, shape.out_features, generator=generator)
    zeros = torch.full_like(scales, middle, dtype=torch.int32)
    groups = trivial_groups(shape.in_features, shape.group_size)
    return QuantizedWeight(shape.bits, shape.group_size, codes.to(torch.uint8), scales.half(), zeros, groups)
