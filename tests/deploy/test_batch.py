"""Drafts for another engine's batch: the text is its target's whatever is drafted, and good drafts are accepted."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.bench_pair import TokenCache
from helpers.copy_pair import COST, TARGET, VOCABULARY, pair_of, plain
from helpers.fake_vllm import FakeEngine
from helpers.tiny_models import CPU
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.decode.costs.pass_costs import PassCost
from quasar_core.deploy.batch import Batch, Decisions, ProposerSettings, Shared
from quasar_core.errors import UsageError
from quasar_core.models.base import CausalLM

RATIO = 4.0


class Clock:
    """Goes on by a tick whenever it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def batch_of(copy: CausalLM, window: Any = "auto", ratio: float = RATIO, copy_texts: int = 4, **changes: Any) -> Batch:
    options = ProposerSettings("copy", window=window, copy_texts=copy_texts)
    return Batch(pair_of(copy, **changes), options, ratio, Clock())


def serve(batch: Batch, requests: Any, limit: int = 8, **options: Any) -> Any:
    engine = FakeEngine(TARGET, lambda *rows: batch.propose(*rows, limit), **options)
    found = engine.run(requests)
    assert all(len(draft) <= limit for drafts in engine.drafted for draft in drafts)
    return found


requests_of = st.lists(
    st.tuples(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30), st.integers(1, 30)),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=25)
@given(
    requests=requests_of,
    noise=st.sampled_from([0.0, 0.3, 3.0]),
    window=st.sampled_from(["auto", 1, 5, 30]),
    seed=st.integers(0, 99),
    limit=st.integers(1, 12),
    cut=st.sampled_from([None, 0, 1, 3]),
    copy_texts=st.integers(0, 4),
)
def test_the_text_is_the_targets_whatever_is_drafted(
    requests: Any, noise: float, window: Any, seed: int, limit: int, cut: int | None, copy_texts: int
) -> None:
    """Copies that are right, often right, and wrong; rows in any order; engines that check fewer tokens."""
    batch = batch_of(TARGET.disturbed(noise), window, copy_texts=copy_texts)
    found = serve(batch, requests, limit, seed=seed, cut=cut)
    assert [asked.answer for asked in found] == [plain(prompt, count) for prompt, count in requests]


def test_all_that_a_right_copy_drafts_is_accepted() -> None:
    """A window of 6 and the bonus token make 7 tokens a pass; the first pass has no draft."""
    batch = batch_of(TARGET, window=6)
    (asked,) = serve(batch, [([1, 2, 3], 70)], limit=6, most=1, seed=4)
    assert asked.accepted == 60
    assert asked.steps == 11


class WholeText(CausalLM):
    """The best token is a hash of all the text, which a wrong cache would change."""

    vocab_size = VOCABULARY
    device = CPU

    def new_cache(self, capacity: int) -> TokenCache:
        return TokenCache(capacity)

    def forward(self, tokens: Any, cache: TokenCache, last_only: bool = False) -> torch.Tensor:
        logits = torch.zeros(len(tokens), VOCABULARY)
        for row, token in enumerate(tokens):
            cache.tokens.append(token)
            logits[row, sum((place + 3) * one for place, one in enumerate(cache.tokens)) % VOCABULARY] = 9.0
        return logits[-1:] if last_only else logits


def test_texts_that_are_decoded_at_once_have_caches_of_their_own() -> None:
    """A right copy's drafts are all accepted: more texts than it takes at once, of which some end before others."""
    model = WholeText()
    batch = batch_of(model, window=6)
    engine = FakeEngine(model, lambda *rows: batch.propose(*rows, 6), most=4)
    for asked in engine.run([([1, 2, length % 7], length) for length in range(20, 90, 10)]):
        assert asked.accepted == len(asked.tokens) - len(asked.prompt) - asked.steps
        assert asked.steps <= 2 + asked.count / 7


def test_the_copys_cache_follows_the_text() -> None:
    """Of a copy that errs now and then no token passes again but those that the target refused."""
    copy = TARGET.disturbed(0.4)
    passed = []
    forward = copy.forward
    copy.forward = lambda tokens, cache, last_only=False: (  # type: ignore[method-assign]
        passed.append(len(tokens)),
        forward(tokens, cache, last_only),
    )[1]
    (asked,) = serve(batch_of(copy, window=4), [([1, 2, 3], 60)], limit=4, most=1)
    assert 0 < asked.accepted < 4 * asked.steps
    # Each target pass leaves at most four refused tokens, the last of the window unpassed, and a bonus token.
    assert sum(passed) < 3 + 6 * asked.steps


def test_a_copy_that_costs_as_much_as_the_target_is_hardly_asked() -> None:
    """What the target's passes cost is seen: the copy, believed to be cheap, drafts no more once they are known."""
    copy = TARGET.disturbed(0.5)
    asked_of = []
    choose = copy.choose
    copy.choose = lambda *given: (asked_of.append(1), choose(*given))[1]  # type: ignore[method-assign]
    clock = Clock()
    pair = pair_of(copy, max_context=4000)
    pair.measured["verifier"] = replace(pair.measured["verifier"], cost=PassCost((1, 33), (9.0, 12.0)))
    batch = Batch(pair, ProposerSettings("copy"), ratio=8.0, now=clock)
    engine = FakeEngine(TARGET, lambda *rows: batch.propose(*rows, 8), most=1)
    engine.run([([1, 2, 3], 600)])
    assert len(asked_of) < 120


def test_more_texts_than_the_copy_takes_have_drafts_without_it() -> None:
    copy = TARGET.disturbed(0.0)
    copy.choose = lambda *given: pytest.fail("the copy was asked")  # type: ignore[method-assign]
    batch = batch_of(copy, copy_texts=0)
    repeating = [3, 1, 4, 1, 5, 9] * 4
    serve(batch, [(repeating, 20)] * 3, most=3)


def test_a_text_that_ends_leaves_its_cache_to_the_next_turn() -> None:
    """The next prompt is the whole conversation: only what is new of it passes."""
    copy = TARGET.disturbed(0.0)
    batch = batch_of(copy, window=4)
    (first,) = serve(batch, [([1, 2, 3, 4, 5, 6, 7, 8] * 4, 20)], most=1)
    passed = []
    forward = copy.forward
    copy.forward = lambda tokens, cache, last_only=False: (  # type: ignore[method-assign]
        passed.append(len(tokens)),
        forward(tokens, cache, last_only),
    )[1]
    serve(batch, [([*first.tokens[:50], 9, 9, 9], 1)], most=1)
    assert passed[0] <= 50 + 3 + 1 - 40


def test_drafts_end_where_a_text_ends() -> None:
    """Behind a token that ends the text nothing is drafted."""
    answer = plain([1, 2, 3], 40)
    ends = frozenset(answer[5:6])
    batch = batch_of(TARGET, window=30, eos_ids=ends)
    first = np.array([[1, 2, 3, answer[0]]])
    (draft,) = batch.propose([[answer[0]]], [4], first, 30)
    known = next(place for place, token in enumerate(answer) if token in ends)
    assert draft == (answer[1 : known + 1] if known else draft)


def test_no_more_is_drafted_than_the_context_holds() -> None:
    batch = batch_of(TARGET, window=30, max_context=12)
    (draft,) = batch.propose([[5]], [9], np.array([[1, 2, 3, 4, 5, 6, 7, 8, 5]]), 30)
    assert len(draft) <= 2


def test_a_pass_over_several_texts_is_shared() -> None:
    """Of 10 tokens for each of 4 texts a pass over 40 tokens costs each a quarter."""
    cost = PassCost((1, 41), (1.0, 5.0))
    assert Shared(cost, 4)(10) == pytest.approx((1.0 + 4.0 * 39 / 40) / 4)


def test_what_passes_cost_is_learned_by_the_number_of_texts() -> None:
    decisions = Decisions(pair_of(TARGET), "auto", RATIO)
    assert decisions.of(3, 0) is decisions.of(4, 0)
    assert decisions.of(4, 0) is not decisions.of(5, 0)
    for _ in range(40):
        decisions.observe(4, 4, 80.0)
    assert decisions.of(4, 0).checker.costs.confirm(1) == pytest.approx(20.0)
    assert decisions.of(1, 0).checker.costs.confirm(1) == pytest.approx(RATIO * COST(1))


@pytest.mark.parametrize(
    ("additional", "named"),
    [
        ({}, "lacks quasar"),
        (None, "lacks quasar"),
        ({"quasar": {}}, "verifier"),
        ({"quasar": {"verifier": "x", "windows": 3}}, "windows"),
        ({"quasar": {"verifier": "x", "window": "often"}}, "window"),
    ],
)
def test_odd_settings_are_named(additional: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ProposerSettings.of(additional)


def test_settings_are_read() -> None:
    found = ProposerSettings.of({"quasar": {"verifier": "x", "window": 3, "draft_from": ["a", "b"]}})
    assert found == ProposerSettings("x", 3, draft_from=("a", "b"))
    with pytest.raises(UsageError, match="--window"):
        ProposerSettings("x", window=0).config()
