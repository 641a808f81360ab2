"""Turn logits into a distribution, draw tokens, and decide which drafted tokens a pass accepts. Pure.

The order is the field's: repetition penalty, temperature, top-k, top-p, min-p (as transformers' generate applies
them). Target and verifier go through the same function, so p and q are compared after it. An acceptance function
returns how many of the offered tokens are accepted, and the bonus token that follows them: the correction where one
was refused, the next token where none was. Letters: T rows, k draft tokens, W window tokens, V vocabulary.
"""

import math
from collections.abc import Sequence
from itertools import accumulate

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


def confirm_block(
    p: torch.Tensor, q: torch.Tensor, window: Sequence[int], generator: torch.Generator
) -> tuple[int, int]:
    """Accept as long a part of a window x_1 … x_W as leaves the target's distribution, judged as a block.

    With r_0 = 1 and r_i = min(1, r_{i−1}·p(x_i) ÷ q(x_i)), the first i tokens are accepted with probability r_i: the
    longest i < W whose luck is below R_i ÷ (R_i + 1 − r_i), R_i = Σ_x (r_i·p − q)+ of the next token's distributions,
    or W, whose luck must be below r_W. After i < W tokens the next is drawn from (r_i·p − q)+, after W from p. A token
    whose ratio is above 1 makes up for one before it, which would be refused if judged by itself; so no fewer are
    accepted than token by token (Leviathan et al., 2023). This is block verification (Sun et al., 2024, arXiv
    2403.10444, Algorithm 2). That the first i pass with probability r_i follows backwards from the window's end,
    wherever that is: it may depend on the tokens before it.

    p [W + 1, V] are the target's distributions, q [W, V] the verifier's, from which the window was drawn.
    """
    count = len(window)
    offered = torch.tensor(window, dtype=torch.long, device=p.device)[:, None]
    ratios = (p[:count].gather(1, offered).double() / q.gather(1, offered).double())[:, 0].tolist()
    reached = list(accumulate(ratios, _carried, initial=1.0))  # r_0 … r_W
    scaled = p[:count] * torch.tensor(reached[:count], dtype=p.dtype, device=p.device)[:, None]
    rests = (scaled - q).clamp_min(0).sum(dim=-1).tolist()  # R_0 … R_{W−1}
    bounds = [_bound(rest, r) for rest, r in zip(rests, reached, strict=False)]
    luck = torch.rand(count, generator=generator, device=p.device).tolist()
    passed = [i for i, bound in enumerate([*bounds[1:], reached[count]], start=1) if luck[i - 1] < bound]
    accepted = max(passed, default=0)
    if accepted == count:
        return accepted, int(draw(p[count:], generator)[0])
    rest = residual(scaled[accepted : accepted + 1], q[accepted : accepted + 1])
    return accepted, int(draw(rest, generator)[0])


def _carried(r: float, ratio: float) -> float:
    """min(1, r · ratio); what follows logits that are not numbers is never accepted."""
    product = r * ratio
    return 0.0 if math.isnan(product) else min(1.0, product)


def _bound(rest: float, r: float) -> float:
    """R ÷ (R + 1 − r); where p is not a number no further token is accepted, and r is left."""
    if math.isnan(rest):
        return r
    return rest / (rest + 1 - r) if rest + 1 > r else 1.0


def residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The normalised positive part of p − q [..., V]; p itself where rounding leaves nothing of it."""
    rest = (p - q).clamp_min(0)
    total = rest.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, rest / total, p)
