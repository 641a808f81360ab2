"""Whole rows of logits while quantizing: draw a token of each, and find the likeliest tokens.

Letters: T rows, V vocabulary, K likeliest tokens.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from quasar_core.quantize.solve import cpp

# Tokens whose chances are summed by themselves, and rows that are drawn for at once.
SPAN, DRAWN = 256, 16


@dataclass(frozen=True)
class Likeliest:
    """The likeliest tokens behind each token of a text, best first, and their chances, both [N, L, K]."""

    tokens: torch.Tensor
    chances: torch.Tensor


def likeliest(logits: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the `width` likeliest tokens of rows of logits [T, V], best first, and their chances, on the CPU."""
    if cpp.runs(logits):
        return cpp.likeliest(logits, width)
    chances, tokens = logits.softmax(dim=-1).topk(width, dim=-1)
    return tokens.cpu(), chances.float().cpu()


def draw(logits: torch.Tensor, chances: torch.Tensor) -> torch.Tensor:
    """Draw a token of each row from the softmax of logits [T, V]: where its running sum passes a chance in [0, 1)."""
    if cpp.runs(logits):
        return cpp.draw(logits, chances)
    drawn = (_draw(*part) for part in zip(logits.split(DRAWN), chances.split(DRAWN), strict=True))
    return torch.cat(list(drawn))


def _draw(logits: torch.Tensor, chances: torch.Tensor) -> torch.Tensor:
    """A span of tokens first, then a token within it: a running sum over all of them would cost the most."""
    weights = pad((logits - logits.amax(dim=-1, keepdim=True)).exp_(), (0, -logits.shape[1] % SPAN))
    spans = weights.view(len(weights), -1, SPAN)
    sums = spans.sum(dim=-1).double().cumsum(dim=-1)
    goals = chances * sums[:, -1]
    span = _passing(sums, goals)
    row = torch.arange(len(spans), device=spans.device)
    before = torch.where(span > 0, sums[row, (span - 1).clamp_min(0)], 0.0)
    return span * SPAN + _passing(spans[row, span].double().cumsum(dim=-1), goals - before)


def _passing(sums: torch.Tensor, goals: torch.Tensor) -> torch.Tensor:
    """Where running sums [T, n] pass the goals [T]; no further than the last place that adds something."""
    last = (sums < sums[:, -1:]).sum(dim=-1)
    return torch.minimum(torch.searchsorted(sums, goals[:, None], right=True)[:, 0], last)
