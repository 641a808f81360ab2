"""The generator: where an answer ends, what of the cache the next one reuses, which models a mode needs."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.near_ties import assert_same_but_for_ties
from helpers.tiny_models import (
    CONTEXT,
    DRAFTERS,
    PROMPT,
    VOCABULARY,
    TableModel,
    drafter_factory,
    generate,
    greedy_by_hand,
    greedy_reference,
    make_pair,
    quantized_copy,
    random_model,
    verifier_of,
)

from quasar_core.config import GenerationConfig, Request, SamplingConfig
from quasar_core.decode.answering import Answering
from quasar_core.decode.generator import Generator
from quasar_core.errors import QuasarError, UsageError

COUNT = 24


@pytest.mark.parametrize("verify", ["full", "exact"])
def test_the_answer_is_never_longer_than_asked(verify: str) -> None:
    expected = greedy_reference("llama", COUNT)
    pair = make_pair(random_model("llama"), quantized_copy("llama", 8))
    for count in range(1, 13):
        for kind in DRAFTERS:
            result = generate(pair, verify, 5, 4, count, drafter_factory(kind, PROMPT + expected))
            assert result.token_ids == expected[:count]
            assert result.finish_reason == "length"


@pytest.mark.parametrize("verify", ["full", "exact"])
def test_end_of_text_inside_a_draft_or_a_window_ends_where_transformers_ends(verify: str) -> None:
    text, model = greedy_reference("qwen2", COUNT), random_model("qwen2").model
    ids = torch.tensor([PROMPT])
    for eos in sorted(set(text), key=text.index)[:8]:
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=COUNT,
            eos_token_id=eos,
            pad_token_id=eos,
        )[0, len(PROMPT) :].tolist()
        pair = make_pair(random_model("qwen2"), quantized_copy("qwen2", 8), eos_ids=frozenset([eos]))
        for kind in ("oracle", "ngram"):
            result = generate(pair, verify, 8, 12, make_draft=drafter_factory(kind, PROMPT + text))
            assert result.token_ids == expected
            assert result.finish_reason == "eos"
            assert result.stats.new_tokens == len(expected)


def test_ignore_eos_goes_on() -> None:
    expected = greedy_reference("qwen2", COUNT)
    pair = make_pair(random_model("qwen2"), eos_ids=frozenset(expected))
    assert generate(pair, "full", ignore_eos=True).token_ids == expected


@pytest.mark.parametrize("verify", ["full", "exact"])
def test_a_stop_string_ends_the_text_before_it(verify: str) -> None:
    expected = greedy_reference("qwen2", COUNT)
    words = [f"w{token}" for token in expected]
    stop = " ".join(words[5:7])
    pair = make_pair(random_model("qwen2"), quantized_copy("qwen2", 8))
    make_draft = drafter_factory("oracle", PROMPT + expected)
    result = generate(pair, verify, 6, 9, make_draft=make_draft, stop=("never", stop))
    assert result.text == " ".join(words[:5]) + " "
    assert result.token_ids == expected[:7]
    assert result.finish_reason == "stop"


@pytest.mark.parametrize("verify", ["full", "exact"])
def test_the_context_limit_ends_the_answer(verify: str) -> None:
    expected = greedy_reference("llama", COUNT)
    for room in (1, 2, 7):
        pair = make_pair(random_model("llama"), quantized_copy("llama", 8), max_context=len(PROMPT) + room)
        result = generate(pair, verify, 8, 12, make_draft=drafter_factory("oracle", PROMPT + expected))
        assert result.token_ids == expected[:room]
        assert result.finish_reason == "length"


def test_a_prompt_without_room_or_without_tokens_is_refused() -> None:
    generator = Generator(make_pair(random_model("llama")), GenerationConfig(8, "full", num_draft_tokens=2))
    with pytest.raises(UsageError, match=f"has {CONTEXT} tokens.*holds {CONTEXT}"):
        generator.generate([1] * CONTEXT)
    with pytest.raises(UsageError, match="empty"):
        generator.generate([])


@pytest.mark.parametrize("verify", ["full", "exact"])
@pytest.mark.parametrize("verifier", ["8", "random"])
def test_a_conversation_that_reuses_the_cache_reads_as_without_it(verify: str, verifier: str) -> None:
    pair = make_pair(random_model("mistral-sliding"), verifier_of("mistral-sliding", verifier))
    config = GenerationConfig(10, verify, num_draft_tokens=3, window=7)  # type: ignore[arg-type]
    kept = Generator(pair, config)
    first = kept.generate(PROMPT)
    longer = PROMPT + list(first.token_ids) + [3, 1, 4]
    other = [*longer[:14], 2, 7]
    for prompt in (longer, other, longer, PROMPT):
        again, fresh = kept.generate(prompt), Generator(pair, config).generate(prompt)
        assert_same_but_for_ties(pair.target.model, [*prompt, *again.token_ids], [*prompt, *fresh.token_ids])
        assert again.stats.cached_tokens > 0
        assert again.stats.prompt_tokens == len(prompt)
    kept.reset()
    assert kept.generate(PROMPT).stats.cached_tokens == 0


def test_what_was_committed_behind_a_stop_text_is_not_kept() -> None:
    """The next prompt is then passed in the same pieces, whatever the mode: in 16 bits its bits depend on them."""
    expected = greedy_reference("qwen2", COUNT)
    pair = make_pair(random_model("qwen2"), quantized_copy("qwen2", 8))
    make_draft = drafter_factory("oracle", PROMPT + expected)
    for drafts, window in ((1, 1), (6, 9)):
        config = GenerationConfig(COUNT, "exact", num_draft_tokens=drafts, window=window, stop=(f"w{expected[6]}",))
        generator = Generator(pair, config, make_draft)
        generator.generate(PROMPT)
        assert generator.generate(PROMPT + expected).stats.cached_tokens == len(PROMPT) + 6


def test_a_request_stands_in_for_length_and_seed_and_changes_no_config() -> None:
    config = GenerationConfig(COUNT, "full", num_draft_tokens=2, sampling=SamplingConfig(temperature=1.0, seed=3))
    generator = Generator(make_pair(random_model("llama")), config)
    fourth = replace(config, max_new_tokens=9, sampling=SamplingConfig(temperature=1.0, seed=4))
    asked = generator.generate(PROMPT, request=Request(9, seed=4))
    assert asked.token_ids == Generator(generator.pair, fourth).generate(PROMPT).token_ids
    assert generator.config is config
    assert generator.generate(PROMPT).token_ids == Generator(generator.pair, config).generate(PROMPT).token_ids


class Interrupted(Exception):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize("passes", [2, 5, 9])
def test_an_interrupted_answer_leaves_a_cache_that_can_be_reused(passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interruption comes with unconfirmed tokens in the window, whose keys and values the verifier wrote."""
    target, verifier = random_model("llama"), quantized_copy("llama", 8)
    generator = Generator(make_pair(target, verifier), GenerationConfig(COUNT, "exact", draft="none", window=7))
    forward, left = verifier.forward, [passes]

    def interrupt(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Interrupted
        return forward(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(verifier, "forward", interrupt)
        with pytest.raises(Interrupted):
            generator.generate(PROMPT)
    longer = PROMPT + greedy_reference("llama", COUNT)[:20]
    result = generator.generate(longer)
    assert result.token_ids == Generator(generator.pair, generator.config).generate(longer).token_ids
    committed = 1 + 8 * (passes // 7)  # at most: the first token, and a full window with its bonus
    assert len(PROMPT) <= result.stats.cached_tokens < len(PROMPT) + committed


def test_a_listener_that_fails_leaves_a_generator_that_works() -> None:
    generator = Generator(make_pair(random_model("llama")), GenerationConfig(COUNT, "full", num_draft_tokens=3))

    def fail(piece: str) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        generator.generate(PROMPT, fail)
    assert generator.generate(PROMPT).token_ids == greedy_reference("llama", COUNT)


@pytest.mark.parametrize(("draft", "steps"), [("wrong", 8), ("oracle", 2)])
def test_no_pass_goes_beyond_the_end_of_the_text(draft: str, steps: int) -> None:
    """The window closes at the end of the text, the ninth token: one confirm, and no step after it."""
    target = TableModel(VOCABULARY, seed=0)
    text = greedy_by_hand(target, target, COUNT)
    assert text.index(text[8]) == 8
    pair = make_pair(target, target, eos_ids=frozenset([text[8]]))
    result = generate(pair, "exact", 6, 30, make_draft=drafter_factory(draft, PROMPT + text))
    assert result.token_ids == text[:9]
    assert result.stats.steps == steps
    assert [confirm.window for confirm in result.stats.confirm_log] == [8]


def test_quantized_runs_without_the_target() -> None:
    verifier = quantized_copy("qwen2")
    expected = greedy_by_hand(verifier, verifier, COUNT)
    assert generate(make_pair(None, verifier), "quantized").token_ids == expected


def test_a_mode_whose_model_is_missing_is_refused() -> None:
    with pytest.raises(UsageError, match="--verify exact needs the target"):
        generate(make_pair(None, quantized_copy("qwen2")), "exact")
    with pytest.raises(QuasarError, match="quasar quantize"):
        generate(make_pair(random_model("qwen2")), "quantized")


def test_the_seed_decides_what_is_drawn() -> None:
    pair = make_pair(random_model("llama"), quantized_copy("llama", 8))
    for verify in ("full", "exact"):
        first, again, other = (
            generate(pair, verify, sampling=SamplingConfig(temperature=1.0, seed=seed)).token_ids for seed in (1, 1, 2)
        )
        assert first == again != other


def test_automatic_lengths_change_nothing() -> None:
    expected = greedy_reference("llama", COUNT)
    pair = make_pair(random_model("llama"), quantized_copy("llama", 8))
    for verify in ("full", "exact"):
        config = GenerationConfig(COUNT, verify)  # type: ignore[arg-type]
        assert Generator(pair, config).generate(PROMPT).token_ids == expected


def test_what_waits_is_told_after_each_step() -> None:
    """Windows are what the verifier wrote behind the confirmed text; an answer is the same whoever looks."""
    pair, config = make_pair(random_model("llama"), quantized_copy("llama", 8)), GenerationConfig(24, window=6)
    told: list[list[int]] = []
    watched = Generator(pair, config).generate(PROMPT, answering=Answering(waiting=lambda w: told.append(list(w))))
    assert watched.token_ids == Generator(pair, config).generate(PROMPT).token_ids
    assert max(map(len, told)) > 1
    assert told[-1] == []
