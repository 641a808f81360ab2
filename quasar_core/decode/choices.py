"""The tokens that a pass chooses, and how sure it is of them: one transfer from the device, whatever is asked.

Letters: T rows of a pass, V vocabulary.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch

from quasar_core.models.base import CausalLM, Choices, ChoosingLM, KVCache, choices_left
from quasar_core.models.cuda_pass import why_not_triton


def choose_in_pass(model: CausalLM, tokens: Sequence[int], cache: KVCache) -> Choices | None:
    """One pass over `tokens` that ends with its greedy choices; None, and no pass, where the model makes none."""
    return model.choose(tokens, cache) if isinstance(model, ChoosingLM) else None


def choose_best(logits: torch.Tensor, margins_of: torch.Tensor | None = None) -> Choices:
    """The best token of each row of logits [T, V], of equal ones the first; margins of the rows of `margins_of`."""
    if (margins_of is None or margins_of is logits) and chooses_in_triton(logits.device):
        return _choose_in_triton(logits)
    if logits.device.type != "cpu":
        return bring_over(logits.argmax(dim=-1), margins_of)
    left = choices_left(logits)
    if left and not any(map(math.isnan, left[1])):
        return Choices(left[0], left[1] if margins_of is logits else _margins_on_host(margins_of))
    # NumPy's argmax reads a row of 152k logits in 7 µs where PyTorch's takes 88 on one core.
    return Choices(logits.numpy().argmax(axis=-1).tolist(), _margins_on_host(margins_of))


def bring_over(tokens: torch.Tensor, margins_of: torch.Tensor | None) -> Choices:
    """Tokens [T] that were chosen already, with the margins of the rows of `margins_of` [T, V] in the same transfer."""
    if margins_of is None or margins_of.device.type == "cpu":
        return Choices(tokens.tolist(), _margins_on_host(margins_of))
    if chooses_in_triton(margins_of.device):
        return _in_one_transfer(tokens, _best_in_triton(margins_of)[1])
    best = margins_of.topk(2, dim=-1).values
    return _in_one_transfer(tokens, best[:, 0] - best[:, 1])


@functools.cache
def chooses_in_triton(device: torch.device) -> bool:
    """Whether one kernel finds choice and margin: PyTorch sorts for it."""
    return why_not_triton(device, torch.bfloat16) is None


def _choose_in_triton(logits: torch.Tensor) -> Choices:
    return _in_one_transfer(*_best_in_triton(logits))


def _best_in_triton(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [T] and margins [T]."""
    from quasar_core.kernels.triton.choices import argmax_and_margin

    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    best, second = torch.empty(2, len(logits), device=logits.device).unbind()
    argmax_and_margin(logits, tokens, best, second)
    return tokens, best - second


def _in_one_transfer(tokens: torch.Tensor, margins: torch.Tensor) -> Choices:
    chosen, brought = torch.stack((tokens.double(), margins.double())).tolist()  # float64 holds any token id
    return Choices([int(token) for token in chosen], brought)


def _margins_on_host(logits: torch.Tensor | None) -> list[float]:
    """The best of each row less the larger of the best before it and the best behind it."""
    margins = []
    for row in () if logits is None else logits.numpy():
        best = int(row.argmax())
        second = max(row[:best].max(initial=-np.inf), row[best + 1 :].max(initial=-np.inf))
        margins.append(float(row[best] - second))
    return margins
