"""Check every Triton kernel against float64, on odd shapes: cases that a test and the GPU bench run."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from quasar_core.kernels.triton.attention import attend
from quasar_core.kernels.triton.blocks import dense_blocks, even_splits, packed_blocks
from quasar_core.kernels.triton.eight_bit import multiply_w8a8, quantize_rows
from quasar_core.kernels.triton.elementwise import (
    rms_norm_residual,
    silu_multiply,
    silu_multiply_rounded,
)
from quasar_core.kernels.triton.packed import multiply_packed
from quasar_core.kernels.triton.products import multiply_dense
from quasar_core.kernels.triton.rotation import Rotation, rotate_and_store
from quasar_core.kernels.triton.shares import attention_workspace
from quasar_core.kernels.triton.weights import prepare_packed
from tools.gpu_bench.attention_checks import joined_attention_cases
from tools.gpu_bench.cases import TOLERANCE, Case, name_of, poisoned, randn, random_codes, relative_error
from tools.gpu_bench.choice_checks import choice_cases
from tools.gpu_bench.expert_checks import choice_of_experts_cases, expert_cases
from tools.gpu_bench.norm_checks import joined_norm_cases


def rotation_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """With and without norms and rotation; a head size that is no power of two."""
    for size, heads, kv_heads in ((64, 4, 2), (80, 3, 1), (128, 8, 2)):
        for has_norms in (False, True):
            for rotates in (False, True):
                switches = f"{' norms' * has_norms}{' rotation' * rotates}"
                name = f"rotate and store {heads}+2·{kv_heads} heads of {size}{switches} {name_of(dtype)}"
                yield name, partial(_rotation, size, heads, kv_heads, has_norms, rotates, device, dtype)


def attention_cases(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """Short and long texts, windows, groups, and what must not be read poisoned."""
    # tokens, query heads, key-value heads, head size, position, window, bound
    cases: list[tuple[int, int, int, int, int, int | None, int]] = [
        (1, 4, 2, 32, 0, None, 128),
        (1, 4, 2, 32, 299, None, 512),
        (5, 6, 2, 32, 62, None, 256),
        (3, 2, 2, 80, 130, 70, 256),
        (4, 4, 1, 32, 300, 33, 1024),
    ]
    if not small:
        lengths = (0, 300, 511, 8000, 32700)
        cases += [(t, 32, 8, 128, at, None, 1 << (at + t).bit_length()) for t in (1, 4, 8, 16) for at in lengths]
        cases += [(4, 28, 4, 128, 8000, 4096, 8192)]
    for case in cases:
        tokens, heads, kv_heads, size, position, window, _ = case
        shape = f"{tokens} tokens, {heads}/{kv_heads} heads of {size} at {position}"
        name = f"attend {shape}{f', window {window}' if window else ''} {name_of(dtype)}"
        yield name, partial(_attention, *case, device, dtype)


def _rotation(
    size: int, heads: int, kv_heads: int, has_norms: bool, rotates: bool, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    count, start, capacity, eps = 3, 6, 16, 1e-6
    qkv = randn(count, (heads + 2 * kv_heads) * size, device=device, dtype=dtype)
    head_norms = randn(heads + kv_heads, size, device=device, dtype=dtype) if has_norms else None
    angles = randn(capacity, size // 2, device=device)
    cos = torch.cat((angles.cos(), angles.cos()), -1).to(dtype)
    sin = torch.cat((-angles.sin(), angles.sin()), -1).to(dtype)
    keys, values = (torch.zeros(kv_heads, capacity, size, device=device, dtype=dtype) for _ in range(2))
    queries = poisoned(count, heads, size, device=device, dtype=dtype)
    position = torch.tensor([start], device=device)
    rotation = Rotation(head_norms, cos if rotates else None, sin if rotates else None, eps)
    rotate_and_store(qkv, rotation, position, keys, values, queries)
    exact = qkv.double().view(count, -1, size)
    rotated, kept = exact[:, : heads + kv_heads], exact[:, heads + kv_heads :]
    if head_norms is not None:
        rotated = rotated * (rotated.square().mean(-1, keepdim=True) + eps).rsqrt() * head_norms.double()
    if rotates:
        rows = slice(start, start + count)
        rotated = rotated * cos[rows, None].double() + rotated.roll(size // 2, -1) * sin[rows, None].double()
    stored = torch.zeros(2, kv_heads, capacity, size, device=device, dtype=torch.float64)
    stored[0, :, start : start + count] = rotated[:, heads:].transpose(0, 1)
    stored[1, :, start : start + count] = kept.transpose(0, 1)
    errors = relative_error(queries, rotated[:, :heads]), relative_error(torch.stack((keys, values)), stored)
    return math.nan if any(map(math.isnan, errors)) else max(errors), 4 * TOLERANCE[dtype]


def _attention(
    tokens: int,
    heads: int,
    kv_heads: int,
    size: int,
    position: int,
    window: int | None,
    bound: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[float, float]:
    queries = randn(tokens, heads, size, device=device, dtype=dtype)
    states = randn(2, kv_heads, bound + 8, size, device=device, dtype=dtype)
    end = position + tokens
    states[:, :, end:] = math.nan  # what lies behind the pass must not be read
    workspace = attention_workspace(device, tokens, heads, size, bound).fill_(math.nan)
    out = poisoned(tokens, heads * size, device=device, dtype=dtype)
    attend(queries, states[0], states[1], torch.tensor([position], device=device), window, workspace, out, bound)
    keys, values = (part[:, :end].double().repeat_interleave(heads // kv_heads, 0) for part in states)
    scores = queries.double().transpose(0, 1) @ keys.transpose(1, 2) / math.sqrt(size)
    own, seen = torch.arange(position, end, device=device)[:, None], torch.arange(end, device=device)
    hidden = (seen > own) | (seen <= own - (window or end + 1))
    exact = scores.masked_fill(hidden, -math.inf).softmax(-1) @ values
    return relative_error(out, exact.transpose(0, 1).reshape(tokens, -1)), 2 * TOLERANCE[dtype]


ROWS = (1, 2, 3, 5, 8, 16)
Term = torch.Tensor | None


def product_cases(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """Packed and 16-bit products of 1 to 16 rows."""
    sizes = [(160, 72, 64), (1088, 80, 128), (96, 64, -1), (64, 136, 32)]
    if not small:
        sizes += [(4096, 6144, 128), (12288, 4096, 128), (4096, 4096, 64), (1024, 151936, 128)]
    for bits in (2, 3, 4, 8):
        for symmetric in (True, False):
            for in_features, out_features, group in sizes:
                kind = "symmetric" if symmetric else "asymmetric"
                name = f"packed {bits} bits {kind} {out_features}×{in_features} group {group} {name_of(dtype)}"
                yield name, partial(_packed, bits, in_features, out_features, group, symmetric, device, dtype)
    for in_features, out_features, splits in [(160, 128, 1), (1088, 384, 3)] + ([] if small else [(4096, 24576, 2)]):
        for bits in (4, 8, 16):
            name = f"gated {bits} bits {out_features}×{in_features} splits {splits} {name_of(dtype)}"
            yield name, partial(_gated, bits, in_features, out_features, splits, device, dtype)
    for in_features, out_features in [(160, 72), (264, 80), (1024, 40)] + (
        [] if small else [(4096, 6144), (12288, 4096)]
    ):
        name = f"dense {out_features}×{in_features} {name_of(dtype)}"
        yield name, partial(_dense, in_features, out_features, device, dtype)


def eight_bit_cases(device: torch.device, small: bool) -> Iterator[Case]:
    """Rows rounded to 8 bits, and their products."""
    kinds = [torch.int8]
    if device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9):
        kinds.append(torch.float8_e4m3fn)
    for kind in kinds:
        for in_features, out_features in [(160, 72), (1056, 80)] + ([] if small else [(4096, 6144)]):
            name = f"w8a8 {name_of(kind)} {out_features}×{in_features}"
            yield name, partial(_eight_bit, kind, in_features, out_features, device)
        if device.type == "cuda" or kind == torch.int8:  # the interpreter's conversion to float8 loses carries
            yield f"norm into {name_of(kind)}", partial(_rounded_norm, kind, device)
            yield f"gate into {name_of(kind)}", partial(_rounded_gate, kind, device)


def _packed(
    bits: int,
    in_features: int,
    out_features: int,
    group_size: int,
    symmetric: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[float, float]:
    weight = random_codes(bits, in_features, out_features, group_size, symmetric, device)
    prepared = prepare_packed(weight, device)

    def multiply(x: torch.Tensor, out: torch.Tensor, bias: Term = None, residual: Term = None) -> None:
        multiply_packed(x, prepared, out, bias, residual)

    return _product_error(multiply, weight.dequantize(), device, dtype), TOLERANCE[dtype]


def _dense(in_features: int, out_features: int, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    weight = randn(out_features, in_features, device=device, dtype=dtype)

    def multiply(x: torch.Tensor, out: torch.Tensor, bias: Term = None, residual: Term = None) -> None:
        multiply_dense(x, weight, out, bias, residual)

    return _product_error(multiply, weight, device, dtype), TOLERANCE[dtype]


def _gated(
    bits: int, in_features: int, out_features: int, splits: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Products that end with the gate, with a bias and without; gates of a size at which its curve shows."""
    multiply: Callable[..., None]
    weight: Any
    if bits == 16:
        exact = weight = randn(out_features, in_features, device=device, dtype=dtype)
        multiply, blocks = multiply_dense, dense_blocks(weight, device)
        steps = -(-in_features // blocks.inputs)
    else:
        codes = random_codes(bits, in_features, out_features, 32, True, device)
        exact, weight = codes.dequantize(), prepare_packed(codes, device)
        multiply, blocks = multiply_packed, packed_blocks(weight, device)
        steps = weight.steps
    blocks = replace(blocks, outputs=128, splits=even_splits(steps, splits))
    x = randn(ROWS[-1], in_features, device=device) / (math.sqrt(in_features) * float(exact.float().std()))
    x, bias = x.to(dtype), randn(out_features, device=device, dtype=dtype)
    worst = 0.0
    for term in (None, bias):
        out = poisoned(len(x), out_features // 2, device=device, dtype=dtype)
        multiply(x, weight, out, term, blocks=blocks, gated=True)
        product = x.double() @ exact.double().t() + (0 if term is None else term.double())
        gate, up = product.chunk(2, dim=-1)
        worst = max(worst, relative_error(out, torch.nn.functional.silu(gate) * up))
    return worst, TOLERANCE[dtype]


def _product_error(
    multiply: Callable[..., None], exact_weight: torch.Tensor, device: torch.device, dtype: torch.dtype
) -> float:
    """The greatest error over the counts of rows, with and without bias and residual, in place too."""
    out_features, in_features = exact_weight.shape
    x = randn(ROWS[-1], in_features, device=device, dtype=dtype)
    bias, residual = (randn(*s, device=device, dtype=dtype) for s in ((out_features,), (ROWS[-1], out_features)))
    product = x.double() @ exact_weight.double().t()
    worst, rows_of_all, depends = 0.0, None, False  # whether a row's result depends on T
    for count in reversed(ROWS):
        out = poisoned(count, out_features, device=device, dtype=dtype)
        multiply(x[:count], out)
        rows_of_all = out if rows_of_all is None else rows_of_all
        depends |= not torch.equal(out, rows_of_all[:count])
        exact = product[:count]
        worst = max(worst, relative_error(out, exact))
        if count not in (3, 16):  # bias and residual come last: not each count of rows need show them
            continue
        sums = residual[:count].clone()
        multiply(x[:count], sums, bias, sums)
        worst = max(worst, relative_error(sums, exact + bias.double() + residual[:count].double()))
    return math.nan if depends else worst


def _rounded_norm(kind: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Codes and steps that differ from those of a norm and a rounding one after the other."""
    hidden, delta = randn(2, 5, 1056, device=device, dtype=torch.float16)
    weight, out = randn(1056, device=device, dtype=torch.float16), torch.empty_like(hidden)
    rms_norm_residual(hidden.clone(), delta, weight, 1e-6, out)
    return _differences(out, kind, partial(rms_norm_residual, hidden, delta, weight, 1e-6))


def _rounded_gate(kind: torch.dtype, device: torch.device) -> tuple[float, float]:
    """The same of the gate."""
    gate_up = randn(5, 2 * 1056, device=device, dtype=torch.float16)
    out = torch.empty_like(gate_up[:, :1056].contiguous())
    silu_multiply(gate_up, out)
    return _differences(out, kind, partial(silu_multiply_rounded, gate_up))


def _differences(out: torch.Tensor, kind: torch.dtype, make_rounded: Callable[..., None]) -> tuple[float, float]:
    found = [(torch.ones_like(out).to(kind), poisoned(len(out), device=out.device, dtype=torch.float32)) for _ in "ab"]
    quantize_rows(out, *found[0])
    make_rounded(*found[1])
    return float(sum((a.float() != b.float()).sum() for a, b in zip(*found, strict=True))), 0.0


def _eight_bit(kind: torch.dtype, in_features: int, out_features: int, device: torch.device) -> tuple[float, float]:
    """The rows' rounding against PyTorch's, and the product of what was rounded."""
    x = randn(ROWS[-1], in_features, device=device, dtype=torch.bfloat16)
    x[2] = 0
    codes = torch.full(x.shape, 1, device=device, dtype=torch.int8).to(kind)
    steps = poisoned(len(x), device=device, dtype=torch.float32)
    quantize_rows(x, codes, steps)
    if kind != torch.int8 and device.type == "cpu":  # the interpreter's conversion to float8 loses carries
        codes.copy_(x.float() / steps[:, None])
    rounded = codes.double() * steps.double()[:, None]
    half_step = 0.5 / 127 if kind == torch.int8 else 2**-4  # of a row's greatest, or of a number
    bound = half_step * (x.double().abs().amax(-1, keepdim=True) if kind == torch.int8 else x.double().abs() + 1e-2)
    if not bool(((rounded - x.double()).abs() <= 1.001 * bound).all()):
        return math.nan, 0.0
    weight = (randn(out_features, in_features, device=device) * 20).clamp(-127, 127).round().to(kind)
    scales = randn(out_features, device=device).abs() + 0.1
    exact = rounded @ weight.double().t() * scales.double()
    worst = 0.0
    for count in ROWS:
        out = poisoned(count, out_features, device=device, dtype=torch.bfloat16)
        multiply_w8a8(codes[:count], steps[:count], weight, scales, out)
        worst = max(worst, relative_error(out, exact[:count]))
    return worst, TOLERANCE[torch.bfloat16]


def correctness_cases(device: torch.device, small: bool) -> Iterator[Case]:
    """(name, callable → (error, tolerance)) for every kernel; `small` for the interpreter."""
    for dtype in TOLERANCE:
        yield from product_cases(device, dtype, small)
        yield from joined_norm_cases(device, dtype, small)
        yield from _elementwise_cases(device, dtype, small)
        yield from rotation_cases(device, dtype)
        yield from attention_cases(device, dtype, small)
        yield from joined_attention_cases(device, dtype, small)
        yield from expert_cases(device, dtype, small)
    yield from eight_bit_cases(device, small)
    yield from choice_cases(device, small)
    yield from choice_of_experts_cases(device)


def _elementwise_cases(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    for size in (96, 256) if small else (96, 256, 4096, 5120):
        yield f"norm {size} {name_of(dtype)}", partial(_norm, size, False, device, dtype)
        yield f"norm with residual {size} {name_of(dtype)}", partial(_norm, size, True, device, dtype)
        yield f"gate {size} {name_of(dtype)}", partial(_gate, size, device, dtype)


def _norm(size: int, has_delta: bool, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    hidden, delta = randn(2, 5, size, device=device, dtype=dtype)
    weight, out = randn(size, device=device, dtype=dtype), poisoned(5, size, device=device, dtype=dtype)
    exact = hidden.double() + (delta.double() if has_delta else 0)
    rms_norm_residual(hidden, delta if has_delta else None, weight, 1e-6, out)
    normed = exact * (exact.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    errors = relative_error(hidden, exact), relative_error(out, normed)
    return math.nan if any(map(math.isnan, errors)) else max(errors), 2 * TOLERANCE[dtype]


def _gate(size: int, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    gate_up, out = randn(5, 2 * size, device=device, dtype=dtype), poisoned(5, size, device=device, dtype=dtype)
    silu_multiply(gate_up, out)
    exact = torch.nn.functional.silu(gate_up[:, :size].double()) * gate_up[:, size:].double()
    return relative_error(out, exact), TOLERANCE[dtype]
