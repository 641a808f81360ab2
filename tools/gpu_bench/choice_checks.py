"""Check the kernels that choose tokens, exactly."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch

from quasar_core.kernels.triton.choices import accept_greedy, argmax_and_margin
from tools.gpu_bench.cases import Case, name_of, poisoned, randn


def choice_cases(device: torch.device, small: bool) -> Iterator[Case]:
    """Random logits, equal ones, and what is no number; drafts of every length."""
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
