"""Sampling: what `full` and `exact` write is distributed as what plain sampling writes.

Two tests of it: all continuations of three tokens, counted out; and the transitions of a long text, which depend on
the last two tokens only.
"""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
from quasar_core.decode import engine as engine_module
from quasar_core.decode.engine import Engine
from quasar_core.decode.policy import FixedLength, WindowPolicy
from quasar_core.decode.sampling import draw
from quasar_core.draft.base import Draft, Drafter
from quasar_core.draft.ngram import NgramDrafter
from quasar_core.draft.none import NoDrafter
from quasar_core.draft.recycle import RecycleDrafter
from quasar_core.draft.suffix import SuffixDrafter

# Fewer texts in the default run; these still show confirms and acceptances that are broken, as tests below tell.
few_or_many = pytest.mark.parametrize("runs", [1500, pytest.param(6000, marks=pytest.mark.slow)])
GOOD, BAD = TARGET.disturbed(0.3), TableModel(VOCABULARY, seed=1)
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


def run_engine(
    verify: str,
    generator: torch.Generator,
    count: int,
    verifier: TableModel,
    drafter: Drafter,
    window: int = 2,
    sampling: SamplingConfig = PLAIN,
) -> Text:
    """`count` tokens after PROMPT."""
    config = GenerationConfig(count, verify, sampling=sampling)  # type: ignore[arg-type]
    pair, longest = make_pair(TARGET, verifier), len(PROMPT) + count
    engine = Engine(
        pair, pair.new_cache(longest), config, drafter, FixedLength(2), WindowPolicy(window), generator, longest
    )
    engine.prefill(PROMPT)
    while engine.committed < longest:
        engine.step()
    return tuple(engine.tokens[len(PROMPT) :])


def continuations(runs: int, make_drafter: Callable[[], Drafter], verify: str, **options: Any) -> Iterator[Text]:
    """Three tokens, many times."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(runs):
        yield run_engine(verify, generator, 3, drafter=make_drafter(), **options)


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
@pytest.mark.parametrize("make_drafter", [NgramDrafter, RandomDrafter])
@pytest.mark.parametrize(("verify", "verifier"), [("full", BAD), ("exact", GOOD), ("exact", BAD)])
def test_continuations_are_distributed_as_plain_samplings(
    verify: str, verifier: TableModel, make_drafter: Callable[[], Drafter], runs: int
) -> None:
    assert p_of_continuations(continuations(runs, make_drafter, verify, verifier=verifier)) > SUSPICIOUS


@pytest.mark.parametrize("verify", ["full", "exact"])
def test_drafts_from_every_source_leave_the_distribution(verify: str) -> None:
    assert p_of_continuations(continuations(1500, ALL_SOURCES, verify, verifier=BAD)) > SUSPICIOUS


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(temperature=0.6),
        SamplingConfig(temperature=1.0, top_k=3),
        SamplingConfig(temperature=1.0, top_p=0.8),
        SamplingConfig(temperature=1.2, min_p=0.15),
        SamplingConfig(temperature=1.0, repetition_penalty=1.5),
    ],
    ids=str,
)
def test_every_option_is_applied_to_target_and_verifier_alike(sampling: SamplingConfig) -> None:
    texts = continuations(1200, NgramDrafter, "exact", verifier=BAD, sampling=sampling)
    assert p_of_continuations(texts, sampling) > SUSPICIOUS


@pytest.mark.parametrize("window", [1, 2, 3, 8])
@pytest.mark.parametrize("verifier", [GOOD, BAD])
def test_a_long_text_has_plain_samplings_transitions(window: int, verifier: TableModel) -> None:
    generator = torch.Generator().manual_seed(window)
    text = run_engine("exact", generator, 1500, verifier, RecycleDrafter() if window == 2 else NgramDrafter(), window)
    assert p_of_transitions(text) > SUSPICIOUS


@pytest.mark.parametrize(
    "make_drafter", [NoDrafter, NgramDrafter, RecycleDrafter, RandomDrafter, SuffixDrafter, ALL_SOURCES]
)
def test_full_has_plain_samplings_transitions(make_drafter: Callable[[], Drafter]) -> None:
    text = run_engine("full", torch.Generator().manual_seed(0), 2500, BAD, make_drafter())
    assert p_of_transitions(text) > SUSPICIOUS


def run_routed(seed: int, count: int, verifier: TableModel, drafter: Drafter, generator: torch.Generator) -> Text:
    engine = routed_engine(make_pair(TARGET, verifier), drafter, drawn_decisions(seed), count, PLAIN, generator)
    engine.max_tokens = len(PROMPT) + count
    engine.prefill(PROMPT)
    while engine.committed < engine.max_tokens:
        engine.step()
    return tuple(engine.tokens[len(PROMPT) :])


@pytest.mark.parametrize("make_drafter", [NgramDrafter, RandomDrafter])
@pytest.mark.parametrize("verifier", [GOOD, BAD])
def test_whoever_checks_a_draft_transitions_are_plain_samplings(
    verifier: TableModel, make_drafter: Callable[[], Drafter]
) -> None:
    """Target or verifier by chance, windows and drafts behind them of any length."""
    text = run_routed(1, 2500, verifier, make_drafter(), torch.Generator().manual_seed(1))
    assert p_of_transitions(text) > SUSPICIOUS


@few_or_many
def test_whoever_checks_a_draft_continuations_are_plain_samplings(runs: int) -> None:
    generator = torch.Generator().manual_seed(5)
    texts = (run_routed(seed, 3, BAD, RandomDrafter(), generator) for seed in range(runs))
    assert p_of_continuations(texts) > SUSPICIOUS


def test_a_draft_that_passes_behind_a_window_unchecked_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "accept_matching", lambda choices, offered: (len(offered), choices[-1]))
    text = run_routed(1, 1500, GOOD, RandomDrafter(), torch.Generator().manual_seed(1))
    assert p_of_transitions(text) < IMPOSSIBLE


def test_the_verifiers_own_distribution_is_another() -> None:
    """Without confirms (`quantized`) a bad verifier shows: the tests above can fail."""
    texts = continuations(600, NgramDrafter, "quantized", verifier=BAD)
    assert p_of_continuations(texts) < IMPOSSIBLE
    text = run_engine("quantized", torch.Generator().manual_seed(0), 1000, BAD, NgramDrafter())
    assert p_of_transitions(text) < IMPOSSIBLE


def accept_everything(p: torch.Tensor, q: torch.Tensor, window: Sequence[int], generator: Any) -> tuple[int, int]:
    return len(window), int(draw(p[-1:], generator))


def forget_the_residual(p: torch.Tensor, q: torch.Tensor, window: Sequence[int], generator: Any) -> tuple[int, int]:
    for i, token in enumerate(window):
        if torch.rand((), generator=generator) * q[i, token] >= p[i, token]:
            return i, int(draw(p[i : i + 1], generator))
    return accept_everything(p, q, window, generator)


@pytest.mark.parametrize("broken", [accept_everything, forget_the_residual])
def test_a_broken_confirm_is_detected(broken: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "confirm_block", broken)
    assert p_of_continuations(continuations(1500, NgramDrafter, "exact", verifier=BAD)) < IMPOSSIBLE


def test_a_broken_acceptance_of_drafts_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "accept_matching", lambda choices, offered: (len(offered), choices[-1]))
    assert p_of_continuations(continuations(600, RandomDrafter, "full", verifier=BAD)) < IMPOSSIBLE
    assert p_of_continuations(continuations(600, ALL_SOURCES, "full", verifier=BAD)) < IMPOSSIBLE
