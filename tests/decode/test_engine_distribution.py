"""Sampling: `full` and `exact` write, for a seed, the text of plain sampling; and that is distributed as it should be.

Of the distribution there are two tests: all continuations of three tokens, counted out over seeds; and the transitions
of a long text, which depend on the last two tokens only.
"""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from helpers.drafters import source_factory
from helpers.sampled_text import (
    IMPOSSIBLE,
    PLAIN,
    PROMPT,
    SUSPICIOUS,
    TARGET,
    VOCABULARY,
    chi_square,
    next_token,
    p_of_transitions,
    p_value,
)
from helpers.tiny_models import TableModel, drawn_decisions, make_pair, routed_engine

from quasar_core.config import GenerationConfig, SamplingConfig
from quasar_core.decode import passes
from quasar_core.decode.engine import Engine
from quasar_core.decode.logits.sampling import Noise
from quasar_core.decode.policy.lengths import FixedLength, WindowPolicy
from quasar_core.draft.base import Draft, Drafter
from quasar_core.draft.ngram import NgramDrafter
from quasar_core.draft.none import NoDrafter
from quasar_core.draft.recycle import RecycleDrafter
from quasar_core.draft.suffix import SuffixDrafter

# Fewer texts in the default run; these still show what is broken, as tests below tell.
few_or_many = pytest.mark.parametrize("runs", [1500, pytest.param(6000, marks=pytest.mark.slow)])
GOOD, BAD = TARGET.disturbed(0.3), TableModel(VOCABULARY, seed=1)
OPTIONS = [
    SamplingConfig(temperature=0.6),
    SamplingConfig(temperature=1.0, top_k=3),
    SamplingConfig(temperature=1.0, top_p=0.8),
    SamplingConfig(temperature=1.2, min_p=0.15),
    SamplingConfig(temperature=1.0, repetition_penalty=1.5),
]
Text = tuple[int, ...]


class RandomDrafter(NoDrafter):
    """Drafts tokens at random."""

    def __init__(self) -> None:
        self.random = random.Random(0)

    def propose(self, limit: int, after: Sequence[int] = ()) -> Draft:
        return Draft.of([self.random.randrange(VOCABULARY) for _ in range(max(limit, 0))], "random", 1)


def _source(kind: str) -> Callable[[], Drafter]:
    """Drafts from texts that are likely after PROMPT, and so would show if they were taken more often than drawn."""
    likely = [int(token) for token in TARGET.table.argmax(-1)[:, 0]] * 3
    return source_factory(kind, [*PROMPT, *likely], 0, VOCABULARY)


ALL_SOURCES = _source("auto")
DRAFTERS = [NoDrafter, NgramDrafter, RecycleDrafter, RandomDrafter, SuffixDrafter, ALL_SOURCES]


@cache
def pair_with(verifier: TableModel) -> Any:
    """Thousands of texts share it: a tokenizer of its own for each took a sixth of the time."""
    return make_pair(TARGET, verifier)


def run_engine(
    verify: str,
    seed: int,
    count: int,
    verifier: TableModel,
    drafter: Drafter,
    window: int = 2,
    sampling: SamplingConfig = PLAIN,
) -> Text:
    """`count` tokens after PROMPT."""
    config = GenerationConfig(count, verify, sampling=replace(sampling, seed=seed))  # type: ignore[arg-type]
    pair, longest = pair_with(verifier), len(PROMPT) + count
    engine = Engine(pair, pair.new_cache(longest), config, drafter, FixedLength(2), WindowPolicy(window), longest)
    return _run(engine, longest)


def run_routed(seed: int, count: int, verifier: TableModel, drafter: Drafter) -> Text:
    """The same where who checks a draft, and how much of it, is drawn at each step."""
    pair, sampling = pair_with(verifier), replace(PLAIN, seed=seed)
    return _run(routed_engine(pair, drafter, drawn_decisions(seed), count, sampling), len(PROMPT) + count)


def _run(engine: Engine, longest: int) -> Text:
    engine.max_tokens = longest
    engine.prefill(PROMPT)
    while engine.committed < longest:
        engine.step()
    return tuple(engine.tokens[len(PROMPT) :])


def plain(seed: int, count: int, sampling: SamplingConfig = PLAIN) -> Text:
    return run_engine("full", seed, count, BAD, NoDrafter(), sampling=sampling)


@pytest.mark.parametrize("make_drafter", DRAFTERS)
@pytest.mark.parametrize(("verify", "verifier"), [("full", BAD), ("exact", GOOD), ("exact", BAD)])
def test_a_seed_fixes_the_text_whoever_drafts_and_verifies(
    verify: str, verifier: TableModel, make_drafter: Callable[[], Drafter]
) -> None:
    for seed, window in enumerate([1, 2, 3, 8]):
        assert run_engine(verify, seed, 80, verifier, make_drafter(), window) == plain(seed, 80), seed


@pytest.mark.parametrize("make_drafter", [NgramDrafter, RandomDrafter])
@pytest.mark.parametrize("verifier", [GOOD, BAD])
def test_a_seed_fixes_the_text_whoever_checks_a_draft(
    verifier: TableModel, make_drafter: Callable[[], Drafter]
) -> None:
    for seed in range(6):
        assert run_routed(seed, 80, verifier, make_drafter()) == plain(seed, 80), seed


@pytest.mark.parametrize("sampling", OPTIONS, ids=str)
def test_every_option_is_applied_to_target_and_verifier_alike(sampling: SamplingConfig) -> None:
    for seed in range(4):
        expected = plain(seed, 80, sampling)
        assert run_engine("exact", seed, 80, BAD, NgramDrafter(), sampling=sampling) == expected
    assert run_engine("quantized", 0, 80, TARGET, NgramDrafter(), sampling=sampling) == plain(0, 80, sampling)


def test_seeds_write_texts_of_their_own() -> None:
    assert len({plain(seed, 30) for seed in range(20)}) == 20


def continuations(runs: int, make_drafter: Callable[[], Drafter], verify: str, **options: Any) -> Iterator[Text]:
    """Three tokens, by many seeds."""
    for seed in range(runs):
        yield run_engine(verify, seed, 3, drafter=make_drafter(), **options)


def enumerate_continuations(sampling: SamplingConfig) -> dict[Text, float]:
    """The probability of every text of three tokens after PROMPT under plain sampling."""
    return {
        text: next_token(PROMPT, sampling)[text[0]]
        * next_token([*PROMPT, text[0]], sampling)[text[1]]
        * next_token([*PROMPT, *text[:2]], sampling)[text[2]]
        for text in itertools.product(range(VOCABULARY), repeat=3)
    }


def p_of_continuations(texts: Iterator[Text], sampling: SamplingConfig = PLAIN) -> float:
    """How likely counts as far from plain sampling's are; 0 for a text that plain sampling never writes."""
    counts, expected = Counter(texts), enumerate_continuations(sampling)
    if any(expected[text] == 0 for text in counts):
        return 0.0
    total = sum(counts.values())
    statistic, cells = chi_square([(counts[text], total * p) for text, p in expected.items()])
    return p_value(statistic, cells - 1)


@few_or_many
@pytest.mark.parametrize(("verify", "verifier"), [("full", BAD), ("exact", GOOD), ("exact", BAD)])
def test_continuations_are_distributed_as_they_should(verify: str, verifier: TableModel, runs: int) -> None:
    assert p_of_continuations(continuations(runs, NgramDrafter, verify, verifier=verifier)) > SUSPICIOUS


@pytest.mark.parametrize("sampling", OPTIONS, ids=str)
def test_every_option_has_its_distribution(sampling: SamplingConfig) -> None:
    texts = continuations(1200, NgramDrafter, "exact", verifier=BAD, sampling=sampling)
    assert p_of_continuations(texts, sampling) > SUSPICIOUS


@pytest.mark.parametrize("make_drafter", DRAFTERS)
def test_transitions_of_a_long_text_are_distributed_as_they_should(make_drafter: Callable[[], Drafter]) -> None:
    assert p_of_transitions(run_engine("exact", 1, 2500, GOOD, make_drafter(), 3)) > SUSPICIOUS


def test_the_verifiers_own_distribution_is_another() -> None:
    """Without confirms (`quantized`) a bad verifier shows: the tests above can fail."""
    texts = continuations(600, NgramDrafter, "quantized", verifier=BAD)
    assert p_of_continuations(texts) < IMPOSSIBLE
    assert p_of_transitions(run_engine("quantized", 0, 1000, BAD, NgramDrafter())) < IMPOSSIBLE


def test_noise_that_does_not_follow_the_position_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    same = Noise.at
    monkeypatch.setattr(Noise, "at", lambda noise, position: same(noise, 0))
    assert p_of_transitions(run_engine("full", 0, 1500, BAD, NoDrafter())) < IMPOSSIBLE


def test_noise_that_prefers_a_token_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    fair = Noise.at
    monkeypatch.setattr(Noise, "at", lambda noise, position: fair(noise, position) + 0.8 * torch.eye(VOCABULARY)[1])
    assert p_of_continuations(continuations(1500, NgramDrafter, "full", verifier=BAD)) < IMPOSSIBLE


def test_a_broken_acceptance_of_drafts_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "accept_matching", lambda choices, offered: (len(offered), choices[-1]))
    assert p_of_continuations(continuations(600, RandomDrafter, "full", verifier=BAD)) < IMPOSSIBLE
    assert p_of_continuations(continuations(600, ALL_SOURCES, "full", verifier=BAD)) < IMPOSSIBLE
    assert p_of_transitions(run_routed(1, 1500, GOOD, RandomDrafter())) < IMPOSSIBLE
