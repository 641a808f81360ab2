"""From logits to a distribution: its properties, and the same numbers as transformers' own warpers."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from quasar_core.config import SamplingConfig
from quasar_core.decode.sampling import distribution, draw

LOGITS = 3 * torch.randn(40, 50, generator=torch.Generator().manual_seed(0))

CONFIGS = [
    SamplingConfig(temperature=0.7),
    SamplingConfig(temperature=1.3, top_k=7),
    SamplingConfig(temperature=1.0, top_p=0.8),
    SamplingConfig(temperature=1.0, top_p=0.01),
    SamplingConfig(temperature=0.9, min_p=0.1),
    SamplingConfig(temperature=0.8, top_k=20, top_p=0.9, min_p=0.05),
    SamplingConfig(temperature=2.0, top_k=500, top_p=1.0),
]


def transformers_distribution(logits: torch.Tensor, config: SamplingConfig) -> torch.Tensor:
    """The warpers that transformers' generate builds, in its order."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(config.temperature)])
    if config.top_k:
        warpers.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        warpers.append(TopPLogitsWarper(config.top_p))
    if config.min_p:
        warpers.append(MinPLogitsWarper(config.min_p))
    ids = torch.zeros(logits.shape[0], 1, dtype=torch.long)
    return warpers(ids, logits).softmax(dim=-1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_distributions_are_those_of_transformers(config: SamplingConfig) -> None:
    ours, theirs = distribution(LOGITS, config), transformers_distribution(LOGITS, config)
    rows = ~on_an_edge(config)
    assert rows.sum() > 30
    assert torch.equal((ours > 0)[rows], (theirs > 0)[rows])
    assert torch.allclose(ours[rows], theirs[rows], atol=1e-6)


def on_an_edge(config: SamplingConfig) -> torch.Tensor:
    """Rows in which a sum or a ratio lies within 1e-6 of where top-p or min-p cuts: rounding decides there."""
    plain = (LOGITS.double() / config.temperature).softmax(dim=-1)
    if config.top_k:
        plain = plain * (plain >= plain.topk(min(config.top_k, 50)).values[:, -1:])
        plain = plain / plain.sum(dim=-1, keepdim=True)
    sums = plain.sort(dim=-1).values.cumsum(dim=-1)  # of those that may be cut
    nucleus = (sums - (1 - config.top_p)).abs().amin(dim=-1) < 1e-6
    share = (plain / plain.amax(dim=-1, keepdim=True) - config.min_p).abs().amin(dim=-1) < 1e-6
    return (nucleus & (config.top_p < 1)) | (share & (config.min_p > 0))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_row_sums_to_one(config: SamplingConfig) -> None:
    assert torch.allclose(distribution(LOGITS, config).sum(dim=-1), torch.ones(40), atol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 50])
def test_top_k_keeps_the_k_best(k: int) -> None:
    kept = distribution(LOGITS, SamplingConfig(temperature=1.0, top_k=k)) > 0
    assert (kept.sum(dim=-1) == k).all()
    assert all(
        set(row.nonzero()[:, 0].tolist()) == set(best.topk(k).indices.tolist())
        for row, best in zip(kept, LOGITS, strict=True)
    )


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.95])
def test_top_p_keeps_the_smallest_nucleus(top_p: float) -> None:
    plain = LOGITS.softmax(dim=-1)
    kept = distribution(LOGITS, SamplingConfig(temperature=1.0, top_p=top_p)) > 0
    for row, probabilities in zip(kept, plain, strict=True):
        mass = probabilities[row]
        assert mass.sum() >= top_p - 1e-6
        assert mass.sum() - mass.min() < top_p + 1e-6
        assert mass.min() >= probabilities[~row].max()


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    probabilities = distribution(LOGITS, SamplingConfig(temperature=1e-30))
    assert torch.equal(probabilities, torch.nn.functional.one_hot(LOGITS.argmax(dim=-1), 50).float())


def test_draws_follow_the_probabilities_and_the_seed() -> None:
    probabilities = torch.tensor([[0.0, 1.0, 0.0]]).repeat(5, 1)
    assert draw(probabilities, torch.Generator().manual_seed(1)).tolist() == [1] * 5
    flat = torch.full((64, 10), 0.1)
    first, again, other = (draw(flat, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
