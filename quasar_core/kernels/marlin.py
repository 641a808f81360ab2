"""Marlin (Frantar et al., 2024, arXiv 2408.11743) on CUDA, as the gptqmodel package builds and calls it.

gptqmodel is imported once a layer on this device is found to fit, and never before: its import takes seconds, and its
first use compiles the kernel. Letters: T rows of a pass, in and out the layer's sizes.
"""

import sys
from contextlib import redirect_stdout
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from quasar_core.checkpoint.gptq_format import QuantizedWeight
from quasar_core.checkpoint.headers import why_not_marlin
from quasar_core.kernels.base import LayerShape
from quasar_core.kernels.gpu import why_not_nvidia


class MarlinKernel:
    """gptqmodel's `MarlinLinear`: symmetric codes of 4 and 8 bits; scales are rounded to the dtype of the products."""

    name = "marlin"

    def why_not(self, shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
        """Ordered groups, sizes of whole tiles, bf16 or float16, on a GPU of the Ampere generation or later."""
        obstacle = why_not_nvidia(device)
        if obstacle:
            return obstacle
        if dtype not in (torch.bfloat16, torch.float16):
            return f"it takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
        if not shape.trivial_groups:
            return "its groups must be in order, and g_idx is not"
        obstacle = why_not_marlin(shape, shape.symmetric)
        if obstacle:
            return obstacle
        return _why_not_built(dtype) if _has_gptqmodel() else "gptqmodel is not installed"

    def prepare(self, weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> Any:
        """The checkpoint's own tensors, which gptqmodel reorders on the device."""
        from gptqmodel.nn_modules.qlinear.marlin import MarlinLinear

        linear: Any = MarlinLinear(
            bits=weight.bits,
            group_size=weight.group_size,
            desc_act=False,
            sym=True,
            in_features=weight.in_features,
            out_features=weight.out_features,
            bias=False,
            dtype=dtype,
        )
        linear.load_state_dict(weight.pack())
        linear.to(device)
        linear.post_init()
        return linear

    def multiply(self, x: torch.Tensor, prepared: Any) -> torch.Tensor:
        """x [T, in] → [T, out], sums in float32."""
        product: torch.Tensor = prepared(x)
        return product


@cache
def _has_gptqmodel() -> bool:
    return find_spec("gptqmodel") is not None


@cache
def _why_not_built(dtype: torch.dtype) -> str | None:
    """What keeps gptqmodel from compiling its kernel, such as a missing compiler; None once it is built."""
    with redirect_stdout(sys.stderr):  # a banner, and the compiler's own lines
        from gptqmodel.utils.marlin import marlin_runtime_error

        error = marlin_runtime_error(dtype)
    return f"gptqmodel cannot build it: {error.strip().splitlines()[0]}" if error.strip() else None
