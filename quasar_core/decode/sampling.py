"""Turn logits into a distribution, draw tokens, and decide which drafted tokens a pass accepts. Pure.

The order is the field's: repetition penalty, temperature, top-k, top-p, min-p (as transformers' generate applies
them). Target and verifier go through the same function, so p and q are compared after it. An acceptance function
returns how many of the offered tokens are accepted, and the bonus token that follows them: the correction where one
was refused, the next token where none was. Letters: T rows, k draft tokens, W window tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch

from quasar_core.config import SamplingConfig
from quasar_core.models.base import NO_TOKEN


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


def accept_matching(choices: Sequence[int], offered: Sequence[int]) -> tuple[int, int]:
    """Accept offered tokens while they equal the model's own choices (k + 1 of them).

    Greedy decoding, and sampling from one-hot drafts: where the choices were drawn from the pass's distribution, the
    accepted tokens and the bonus are draws from it (Leviathan et al., 2023, with a one-hot proposal).
    """
    accepted = 0
    while accepted < len(offered) and choices[accepted] == offered[accepted]:
        accepted += 1
    return accepted, choices[accepted]


def confirm_sampled(
    p: torch.Tensor, q: torch.Tensor, window: Sequence[int], generator: torch.Generator
) -> tuple[int, int]:
    """Accept window token x with probability min(1, p(x) / q(x)); at the first refusal draw from (p − q)+.

    p [W + 1, V] are the target's distributions, q [W, V] the verifier's, from which the window was drawn.
    (Leviathan et al., 2023, Theorem 1; the accepted tokens and the bonus are draws from p.)
    """
    offered = torch.tensor(window, dtype=torch.long, device=p.device)[:, None]
    luck = torch.rand(len(window), generator=generator, device=p.device)
    passed = luck * q.gather(1, offered)[:, 0] < p.gather(1, offered)[:, 0]
    accepted = passed.cumprod(0).sum()[None]  # those before the first refusal; on the device, so nothing waits for it
    refusing_q = q.index_select(0, accepted.clamp_max(len(window) - 1)) * (accepted < len(window))
    bonus = draw(residual(p.index_select(0, accepted), refusing_q), generator)
    count, token = torch.cat((accepted, bonus)).tolist()
    return count, token


def residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The normalised positive part of p − q [..., V]; p itself where rounding leaves nothing of it."""
    rest = (p - q).clamp_min(0)
    total = rest.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, rest / total, p)
