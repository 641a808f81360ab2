"""Arithmetic of the passes on a CPU, where PyTorch's own choice is slow: products in float32, and causal attention.

PyTorch gives float32 products to MKL, which runs code for AVX2 on processors that are not Intel's: 98 GFLOP/s on a
Zen 5 core, where oneDNN, which the same build carries, reaches 208 to 230. Its attention computes the upper triangle
of scores, too, in rows of up to 512 tokens; without that, two thirds of the time is enough, in bfloat16 as well.
Letters: L tokens of a row, D of a head.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from quasar_core.kernels.cpu.causal_attention import attends
from quasar_core.kernels.cpu.causal_attention import causal_attention as attention_in_cpp
from quasar_core.quantize.solve import cpp
from quasar_core.system import processor_flags

_SETTING = "matmul"  # of oneDNN's products, which older PyTorch does not have
QUERIES = 64  # that attention takes at a time: as many as PyTorch's kernel holds in a block


def product(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """left [..., k] · rightᵀ [k, n] + bias [n]: what a linear layer with the weight `right` gives."""
    if not (_on_cpu(left, right) and right.is_contiguous() and left.numel() and _has_onednn()):
        return linear(left, right, bias)
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(left.contiguous(), right, bias, "none", [], "")
    return result


def add_product_(sums: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Add leftᵀ · right to sums [m, n]; of left [k, m] and right [k, n], in float32 in C++ where that runs."""
    if cpp.runs(sums):
        cpp.add_product(left, right, sums)
        return sums
    return sums.addmm_(left.t(), right)


def times(symmetric: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A symmetric matrix [k, k] · right [k, n]."""
    return add_product_(torch.zeros_like(right), symmetric, right)


def product_of_bf16(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left [m, k] · rightᵀ [k, n] in float32, of numbers that bfloat16 can hold: no more is rounded than in `product`.

    AMX multiplies such numbers at many times the rate of float32, and adds in float32.
    """
    if not (_on_cpu(left, right) and _has_amx()):
        return product(left, right)
    with _bf16_inside():
        return left @ right.t()


@contextlib.contextmanager
def _bf16_inside() -> Iterator[None]:
    """Let oneDNN read float32 as bfloat16."""
    setting = getattr(torch.backends.mkldnn, _SETTING)
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    """Causal attention [..., L, D], some queries at a time, each over the keys that it may see."""
    length, size = query.shape[-2:]
    if query.dim() == 4 and size == value.shape[-1] and attends(query.device, query.dtype, size):
        return attention_in_cpp(query, key, value, options.get("scale") or size**-0.5)
    parts = []
    for begin in range(0, length, QUERIES):
        end = min(begin + QUERIES, length)
        seen = torch.ones(end - begin, end, dtype=torch.bool).tril(begin)
        part = scaled_dot_product_attention(
            query[..., begin:end, :], key[..., :end, :], value[..., :end, :], attn_mask=seen, **options
        )
        parts.append(part)
    return torch.cat(parts, dim=-2)


class FastPasses(TorchFunctionMode):
    """Inside it, a model's linear layers and its attention are computed as above."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """What PyTorch calls in a function's place; the mode is off meanwhile."""
        kwargs = kwargs or {}
        if func is linear and not kwargs:
            return product(*args)
        if func is scaled_dot_product_attention and _is_causal(*args, **kwargs):
            options = {name: kwargs[name] for name in ("scale", "enable_gqa") if name in kwargs}
            return causal_attention(*args, **options)
        return func(*args, **kwargs)


def _is_causal(*tensors: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, **_: Any) -> bool:
    """Whether this is attention of rows to themselves that the kernel of the CPU computes, and nothing else."""
    if not is_causal or attn_mask is not None or dropout_p != 0.0 or len(tensors) != 3:
        return False
    return _on_cpu(*tensors, dtypes=(torch.float32, torch.bfloat16)) and tensors[0].shape[-2] == tensors[1].shape[-2]


def _on_cpu(*tensors: torch.Tensor, dtypes: Sequence[torch.dtype] = (torch.float32,)) -> bool:
    return all(tensor.device.type == "cpu" and tensor.dtype in dtypes for tensor in tensors)


def sums_pairs(tensor: torch.Tensor) -> bool:
    """Whether sums over tokens are taken in C++: in bfloat16, at twice the rate of float32, where there is no AMX."""
    return not _has_amx() and cpp.sums_pairs(tensor)


def sums_in_bf16(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether sums over tokens of activations in that dtype take products in bfloat16: with AMX, or in C++."""
    empty = torch.empty(0, device=device, dtype=dtype)
    return _on_cpu(empty, dtypes=(torch.bfloat16,)) and (_has_amx() or cpp.sums_pairs(empty))


def _has_amx() -> bool:
    """Whether oneDNN multiplies in AMX what float32 holds of bfloat16."""
    return "amx_bf16" in processor_flags() and hasattr(torch.backends.mkldnn, _SETTING)


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
