"""From logits to a draw: what may be drawn is what transformers' own warpers leave, noise is fixed and fair."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from helpers.sampled_text import SUSPICIOUS, chi_square, p_value
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from quasar_core.config import SamplingConfig
from quasar_core.decode.logits import sampling
from quasar_core.decode.logits.sampling import MOST_KEPT, Noise, accept_matching, gumbel_noise, keep_likely

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


def distribution(logits: torch.Tensor, config: SamplingConfig) -> torch.Tensor:
    """The probabilities [T, V] that are drawn from."""
    return (keep_likely(logits, config).double() / config.temperature).softmax(dim=-1)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_distributions_are_those_of_transformers(config: SamplingConfig) -> None:
    ours, theirs = distribution(LOGITS, config), transformers_distribution(LOGITS, config)
    rows = ~on_an_edge(config)
    assert rows.sum() > 30
    assert torch.equal((ours > 0)[rows], (theirs > 0)[rows])
    assert torch.allclose(ours[rows].float(), theirs[rows], atol=1e-6)


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


@pytest.mark.parametrize("ends", [{"top_p": 0.0}, {"min_p": 1.0}, {"top_p": 0.0, "min_p": 1.0, "top_k": 5}], ids=str)
def test_at_its_end_a_bound_leaves_the_best_alone_as_in_transformers(ends: dict[str, Any]) -> None:
    config = SamplingConfig(temperature=1.5, **ends)
    kept = distribution(LOGITS, config) > 0
    assert torch.equal(kept, transformers_distribution(LOGITS, config) > 0)
    assert torch.equal(kept.int().argmax(dim=-1), LOGITS.argmax(dim=-1))
    assert (kept.sum(dim=-1) == 1).all()


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


CPU = torch.device("cpu")


def drawn(logits: torch.Tensor, config: SamplingConfig, seed: int, positions: Sequence[int]) -> list[int]:
    """The tokens that are drawn from rows [T, V]."""
    noisy = Noise(seed, logits.shape[-1], CPU).add(keep_likely(logits, config), positions, config.temperature)
    return noisy.argmax(dim=-1).tolist()  # type: ignore[no-any-return]


def test_a_tiny_temperature_is_greedy() -> None:
    tokens = drawn(LOGITS, SamplingConfig(temperature=1e-30), 0, range(40))
    assert tokens == LOGITS.argmax(dim=-1).tolist()


same_noise = cache(gumbel_noise)  # for every config; what it is made from is tested below


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_draws_follow_the_distribution(config: SamplingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 positions of one row, in passes of 50: counts as chi-square has them, and nothing that is left out."""
    monkeypatch.setattr(sampling, "gumbel_noise", same_noise)
    row = LOGITS[0]
    expected = 20_000 * distribution(row[None], config)[0]
    noise = Noise(3, 50, CPU)
    kept = keep_likely(row[None], config).repeat(50, 1)
    passes = [noise.add(kept, range(begin, begin + 50), config.temperature) for begin in range(0, 20_000, 50)]
    counts = torch.bincount(torch.cat(passes).argmax(dim=-1), minlength=50)
    assert counts[expected == 0].sum() == 0
    statistic, cells = chi_square(list(zip(counts.tolist(), expected.tolist(), strict=True)))
    assert cells < 2 or p_value(statistic, cells - 1) > SUSPICIOUS


def test_rare_tokens_are_drawn_as_often_as_they_should() -> None:
    """100,000 tokens of 1e-8 each beside a sure one: noise in float32 would draw one of them far too often."""
    logits = torch.full((1, 100_001), float(np.log(1e-8)))
    logits[0, 0] = 0.0
    noise = Noise(0, 100_001, CPU)
    rare = sum(int(noise.add(logits, [position], 1.0).argmax()) > 0 for position in range(1500))
    assert rare <= 9  # 1.5 are expected, and of numbers in float32 19


def test_seed_and_position_fix_the_noise_and_nothing_else_does() -> None:
    """Asked in any order, again, and after it was forgotten; other seeds and positions have other noise."""
    noise, positions = Noise(7, 30, CPU), [*range(3 * MOST_KEPT), 5, 2 * MOST_KEPT, 0]
    for position in positions:
        assert torch.equal(noise.at(position), gumbel_noise(7, position, 30, CPU)), position
    rows = {tuple(gumbel_noise(seed, position, 30, CPU).tolist()) for seed in range(5) for position in range(5)}
    assert len(rows) == 25


def test_a_negative_seed_is_one_of_its_own() -> None:
    minus, plus = (Noise(seed, 30, CPU).at(0) for seed in (-7, 7))
    assert not torch.equal(minus, plus)


def test_noise_is_gumbels() -> None:
    """Mean, variance and the logarithm of the exponentials' own mean, over 2^20 numbers."""
    noise = torch.cat([gumbel_noise(1, position, 2**15, CPU) for position in range(32)]).double()
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.01)
    assert noise.var().item() == pytest.approx(np.pi**2 / 6, abs=0.02)
    assert (-noise).exp().mean().item() == pytest.approx(1, abs=0.01)
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.005


def test_a_lone_token_that_is_left_is_drawn() -> None:
    kept = SamplingConfig(temperature=5.0, top_k=1)
    assert drawn(LOGITS, kept, 1, range(40)) == LOGITS.argmax(dim=-1).tolist()


@pytest.mark.parametrize(
    ("choices", "offered", "expected"),
    [
        ([5], [], (0, 5)),
        ([1, 2, 3], [1, 2], (2, 3)),
        ([1, 9, 3], [1, 2], (1, 9)),
        ([7, 2, 3], [1, 2], (0, 7)),  # what follows a refused token is never accepted
    ],
)
def test_tokens_are_accepted_until_the_first_difference(
    choices: list[int], offered: list[int], expected: tuple[int, int]
) -> None:
    assert accept_matching(choices, offered) == expected
