"""From logits to a distribution to a token; pure. Letters: T rows, V vocabulary.

The order is the field's: logits processors (`processors.py`), temperature, top-k, top-p, min-p (as transformers'
generate applies them). Target and verifier go through the same functions, so p and q are compared after them.
"""

import torch

from quasar_core.config import SamplingConfig
from quasar_core.models.choices import NO_TOKEN


def distribution(logits: torch.Tensor, config: SamplingConfig) -> torch.Tensor:
    """Probabilities [T, V] of logits [T, V] after temperature, top-k, top-p and min-p (temperature above 0)."""
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / config.temperature  # the best is 0: no overflow
    if 0 < config.top_k < logits.shape[-1]:
        smallest = logits.topk(config.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if config.top_p < 1:
        logits = _keep_nucleus(logits, config.top_p)
    probabilities = logits.softmax(dim=-1)
    if config.min_p > 0:
        best = probabilities.max(dim=-1, keepdim=True).values
        probabilities = probabilities.masked_fill(probabilities < config.min_p * best, 0)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return probabilities


def _keep_nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest set of best tokens whose probability reaches top_p; the best token always stays."""
    ordered, order = logits.sort(dim=-1, descending=True)
    before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
    return logits.masked_fill(dropped, -torch.inf)


def draw(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token from each row of [T, V] → [T], by inverting the cumulative distribution.

    It is `NO_TOKEN` where a row holds NaN, as it does where the best logit is not a finite number.

    `torch.multinomial` draws V numbers a row (8 rows of 152k take 19.6 ms on one core, and 0.9 here), and makes a
    GPU's host wait for its checks.
    """
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    luck = torch.rand(len(probabilities), 1, generator=generator, dtype=torch.float64, device=probabilities.device)
    found = torch.searchsorted(cumulative, luck * cumulative[:, -1:], right=True)[:, 0]
    return torch.where(found < probabilities.shape[-1], found, NO_TOKEN)
