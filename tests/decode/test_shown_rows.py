"""What drafters are shown of a pass is what the pass computed; drafts from it change no text."""

from collections.abc import Sequence
from typing import Any

import pytest
from helpers.tiny_models import PROMPT, VOCABULARY, TableModel, generate, greedy_by_hand, make_pair
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.config import GenerationConfig, SamplingConfig
from quasar_core.decode.generator import Generator
from quasar_core.draft.base import Draft
from quasar_core.draft.ngram import NgramDrafter
from quasar_core.draft.recycle import RecycleDrafter

TARGET = TableModel(VOCABULARY, seed=0)


class Watcher(NgramDrafter):
    """Keeps what it is shown, with the text before it."""

    wants_best = 3

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[tuple[list[int], list[list[int]]]] = []

    def see(self, tokens: Sequence[int], best: Sequence[Sequence[int]], start: int) -> None:
        assert tokens[0] == self.context[start]
        for i, row in enumerate(best):
            self.shown.append(([*self.context[:start], *tokens[: i + 1]], list(row)))
        assert len(best) == len(tokens)

    def propose(self, limit: int, after: Sequence[int] = ()) -> Draft:
        """Now and then something wrong."""
        draft = super().propose(limit, after)
        return draft if len(self.context) % 3 else Draft.of([1] * limit, "wrong", 0)


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(1.0), SamplingConfig(repetition_penalty=1.3)])
@pytest.mark.parametrize("verify", ["full", "exact"])
def test_rows_are_those_of_the_models_logits(verify: str, sampling: SamplingConfig) -> None:
    verifier, watcher = TARGET.disturbed(0.3), Watcher()
    result = generate(make_pair(TARGET, verifier), verify, 3, 4, 40, lambda: watcher, sampling=sampling)
    models = [TARGET] if verify == "full" else [TARGET, verifier]
    found = [
        [model.table[text[-2], text[-1]].sort(stable=True, descending=True).indices[:3].tolist() for model in models]
        for text, _ in watcher.shown
    ]
    assert all(row in expected for (_, row), expected in zip(watcher.shown, found, strict=True))
    assert {
        model
        for (_, row), expected in zip(watcher.shown, found, strict=True)
        for model, other in zip(range(len(models)), expected, strict=True)
        if row == other
    } == set(range(len(models)))
    seen = {tuple(text) for text, _ in watcher.shown}
    whole = [*PROMPT, *result.token_ids]
    assert all(tuple(whole[:end]) in seen for end in range(len(PROMPT), len(whole)))


@given(
    seed=st.integers(0, 3),
    noise=st.sampled_from([0.0, 0.3, 3.0]),
    verify=st.sampled_from(["full", "exact"]),
    drafts=st.integers(1, 16),
    window=st.integers(1, 20),
    prompt=st.lists(st.integers(0, 12), min_size=2, max_size=20),
)
@settings(deadline=None, derandomize=True, max_examples=40)
def test_recycled_drafts_change_no_text(
    seed: int, noise: float, verify: str, drafts: int, window: int, prompt: list[int]
) -> None:
    """On small tables texts go in circles, so that drafts are long; later answers begin with the earlier rows."""
    target = TableModel(13, seed)
    pair = make_pair(target, target.disturbed(noise))
    config = GenerationConfig(30, verify, "recycle", num_draft_tokens=drafts, window=window)  # type: ignore[arg-type]
    generator, plain = Generator(pair, config), Generator(pair, GenerationConfig(30, "full", "none"))
    for text in (prompt, prompt[::-1], prompt):
        assert generator.generate(text).token_ids == plain.generate(text).token_ids


def answers(config: GenerationConfig) -> list[Any]:
    generator = Generator(make_pair(TARGET), config)
    return [generator.generate(PROMPT) for _ in range(2)]


def test_a_second_answer_drafts_from_what_the_first_computed() -> None:
    first, second = answers(GenerationConfig(40, "full", "recycle", num_draft_tokens=8))
    assert first.token_ids == second.token_ids == greedy_by_hand(TARGET, TARGET, 40)
    assert second.stats.steps == 5  # 39 tokens, at most 9 of a step
    assert first.stats.steps > 5


def test_what_a_sampled_answer_shows_serves_the_next_and_changes_no_text() -> None:
    config = GenerationConfig(40, "full", "recycle", num_draft_tokens=8, sampling=SamplingConfig(1.0))
    first, second = answers(config)
    assert first.token_ids == second.token_ids
    assert second.stats.steps < first.stats.steps


def test_drafts_come_from_rows_alone() -> None:
    drafter = RecycleDrafter()
    drafter.observe([1, 2, 1, 2, 1])
    assert drafter.propose(4) == Draft()
