"""Rotation, the write into the cache, and attention over it, against float64."""

import math
from collections.abc import Iterator
from functools import partial

import torch

from quasar_core.kernels.triton.attention import attend, attention_workspace
from quasar_core.kernels.triton.check_tools import TOLERANCE, Case, name_of, poisoned, randn, relative_error
from quasar_core.kernels.triton.rope import rotate_and_store


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
    table = (cos, sin) if rotates else (None, None)
    rotate_and_store(qkv, head_norms, table[0], table[1], position, keys, values, queries, eps)
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
    workspace = attention_workspace(device, tokens, heads, size).fill_(math.nan)
    out = poisoned(tokens, heads * size, device=device, dtype=dtype)
    attend(queries, states[0], states[1], torch.tensor([position], device=device), window, workspace, out, bound)
    keys, values = (part[:, :end].double().repeat_interleave(heads // kv_heads, 0) for part in states)
    scores = queries.double().transpose(0, 1) @ keys.transpose(1, 2) / math.sqrt(size)
    own, seen = torch.arange(position, end, device=device)[:, None], torch.arange(end, device=device)
    hidden = (seen > own) | (seen <= own - (window or end + 1))
    exact = scores.masked_fill(hidden, -math.inf).softmax(-1) @ values
    return relative_error(out, exact.transpose(0, 1).reshape(tokens, -1)), 2 * TOLERANCE[dtype]
