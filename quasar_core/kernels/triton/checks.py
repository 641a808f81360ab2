"""Every kernel against the same computation in float64: on a GPU, or interpreted on the CPU at small shapes.

A check fills its outputs with NaN first, so that a place that no program wrote shows. Errors are ‖y − exact‖ ÷ ‖exact‖
unless a check counts differences, where the tolerance is 0.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch

from quasar_core.kernels.triton.activation import silu_multiply
from quasar_core.kernels.triton.check_attention import attention_cases, rotation_cases
from quasar_core.kernels.triton.check_products import eight_bit_cases, product_cases
from quasar_core.kernels.triton.check_tools import TOLERANCE, Case, name_of, poisoned, randn, relative_error
from quasar_core.kernels.triton.choices import accept_greedy, argmax_and_margin
from quasar_core.kernels.triton.norms import rms_norm_residual


def correctness_cases(device: torch.device, small: bool) -> Iterator[Case]:
    """(name, callable → (error, tolerance)) for every kernel; `small` for the interpreter."""
    for dtype in TOLERANCE:
        yield from product_cases(device, dtype, small)
        yield from _elementwise_cases(device, dtype, small)
        yield from rotation_cases(device, dtype)
        yield from attention_cases(device, dtype, small)
    yield from eight_bit_cases(device, small)
    yield from _choice_cases(device, small)


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


def _choice_cases(device: torch.device, small: bool) -> Iterator[Case]:
    spoilers = {"random": lambda logits: None, "ties": _tie, "NaN and infinities": _not_a_number}
    for dtype in (torch.float32, torch.bfloat16):
        for name, spoil in spoilers.items():
            vocabulary = 5000 if small else 151936
            yield f"argmax and margin, {name}, {name_of(dtype)}", partial(_choice, vocabulary, dtype, spoil, device)
    yield "accept greedy", partial(_acceptance, device)


def _choice(
    vocabulary: int, dtype: torch.dtype, spoil: Callable[[torch.Tensor], None], device: torch.device
) -> tuple[float, float]:
    """Rows whose token, greatest or second logit differs from PyTorch's."""
    logits = randn(6, vocabulary, device=device, dtype=dtype)
    spoil(logits)
    tokens = torch.full((6,), -2, device=device)
    best, second = (poisoned(6, device=device, dtype=torch.float32) for _ in range(2))
    argmax_and_margin(logits, tokens, best, second)
    top = logits.float().topk(2, dim=-1).values
    expected = torch.where(top[:, 0].isfinite(), logits.float().argmax(-1), -1)
    right = (tokens == expected) & _same(best, top[:, 0]) & _same(second, top[:, 1])
    return float((~right).sum()), 0.0


def _tie(logits: torch.Tensor) -> None:
    logits[:, [17, 2100, logits.shape[1] - 1]] = 99.0


def _not_a_number(logits: torch.Tensor) -> None:
    logits[0, 4000], logits[1, [3, 4]], logits[2, 5] = math.nan, math.nan, math.inf
    logits[3], logits[4, 1:] = -math.inf, -math.inf


def _acceptance(device: torch.device) -> tuple[float, float]:
    """Drafts of 0 to 4 tokens that differ from the choices from one token on, then filled up: counts that are wrong."""
    chosen = torch.tensor([5, 6, 7, 8, 9, 9], device=device)
    wrong = 0
    for drafted in range(5):
        for differs in range(drafted + 1):
            for filled in (0, 1):
                tokens = chosen.roll(1)[: 1 + drafted + filled].clone()
                tokens[1 + differs : 1 + drafted] += 1
                accepted = torch.full((1,), -1, device=device)
                accept_greedy(chosen[: len(tokens)], tokens, torch.tensor([drafted], device=device), accepted)
                wrong += int(accepted) != differs
    return float(wrong), 0.0


def _same(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a == b) | (a.isnan() & b.isnan())
