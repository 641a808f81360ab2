"""Norms that join the products around them (`kernels/triton/stream.py`) against float64."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from quasar_core.kernels.triton.blocks import dense_blocks, packed_blocks
from quasar_core.kernels.triton.packed import multiply_packed
from quasar_core.kernels.triton.products import multiply_dense
from quasar_core.kernels.triton.stream import NextNorm, Stream, begin_stream
from quasar_core.kernels.triton.weights import prepare_packed
from tools.gpu_bench.cases import TOLERANCE, Case, name_of, poisoned, randn, random_codes, relative_error

EPS = 1e-6
ROWS = (16, 3, 1)


def joined_norm_cases(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """A product that adds to the stream, then one that reads the norm of it, and one that ends with a gate."""
    for size, inputs in [(136, 160)] if small else [(136, 160), (4096, 4096), (4096, 12288)]:
        for bits in (4, 16):
            name = f"joined norms {bits} bits {size}×{inputs} {name_of(dtype)}"
            yield name, partial(_joined, bits, size, inputs, device, dtype)


def _joined(bits: int, size: int, inputs: int, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    down, exact_down = _weight(bits, inputs, size, device, dtype)
    wide, exact_wide = _weight(bits, size, 256, device, dtype)
    multiply: Any = multiply_packed if bits == 4 else multiply_dense
    blocks: Any = packed_blocks if bits == 4 else dense_blocks
    x = randn(ROWS[0], inputs, device=device, dtype=dtype) / (math.sqrt(inputs) * float(exact_down.std()))
    hidden, norm = randn(ROWS[0], size, device=device, dtype=dtype), randn(size, device=device, dtype=dtype)
    x, shape = x.to(dtype), blocks(down, device)
    worst, of_all, depends = 0.0, None, False  # whether a row's result depends on T
    for count in ROWS:
        stream = hidden[:count].clone()
        squares = poisoned(count, -(-size // shape.outputs), device=device, dtype=torch.float32)
        before = NextNorm(norm, poisoned(count, size, device=device, dtype=dtype), squares)
        multiply(x[:count], down, stream, None, stream, blocks=shape, before=before)
        found = Stream(stream, before.scaled, squares, EPS)
        plain = poisoned(count, 256, device=device, dtype=dtype)
        gated = poisoned(count, 128, device=device, dtype=dtype)
        multiply(found.scaled, wide, plain, behind=found)
        multiply(found.scaled, wide, gated, gated=True, behind=found)
        results = stream, plain, gated
        of_all = of_all or results
        depends |= not all(torch.equal(own, rows[:count]) for own, rows in zip(results, of_all, strict=True))
        sums = hidden[:count].double() + x[:count].double() @ exact_down.t()
        product = _normed(stream, norm) @ exact_wide.t()  # of the stream as it was rounded
        gate, up = product.chunk(2, -1)
        first = begin_stream(stream, norm, EPS)
        again = poisoned(count, 256, device=device, dtype=dtype)
        multiply(first.scaled, wide, again, behind=first)
        pairs = (stream, sums), (plain, product), (again, product), (gated, torch.nn.functional.silu(gate) * up)
        worst = max(worst, *(relative_error(own, exact) for own, exact in pairs))
    return math.nan if depends else worst, 2 * TOLERANCE[dtype]


def _weight(bits: int, inputs: int, outputs: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, torch.Tensor]:
    """As the kernel takes it, and in float64; of a size at which a gate's curve shows."""
    if bits == 16:
        weight = (randn(outputs, inputs, device=device) / math.sqrt(inputs)).to(dtype)
        return weight, weight.double()
    codes = random_codes(bits, inputs, outputs, 32 if inputs % 64 else 64, True, device)
    codes.scales.mul_(1 / (4 * math.sqrt(inputs)))
    return prepare_packed(codes, device), codes.dequantize().double()


def _normed(stream: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    exact = stream.double()
    return exact * (exact.square().mean(-1, keepdim=True) + EPS).rsqrt() * norm.double()
