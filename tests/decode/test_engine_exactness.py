"""Greedy decoding in float32 is, token for token, what transformers' own greedy `generate` writes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.near_ties import clear_prompt
from helpers.tiny_models import (
    ARCHITECTURES,
    DRAFTERS,
    PROMPT,
    VOCABULARY,
    RoundedCheckpoint,
    TableModel,
    drafter_factory,
    drawn_decisions,
    generate,
    greedy_by_hand,
    greedy_reference,
    make_pair,
    quantized_copy,
    random_model,
    routed_engine,
    verifier_of,
)
from transformers import AutoModelForCausalLM

import quasar_core.demo
from quasar_core.config import GenerationConfig, SamplingConfig
from quasar_core.decode.engine import Engine
from quasar_core.decode.generator import Generator
from quasar_core.decode.policy.lengths import FixedLength, WindowPolicy
from quasar_core.draft.ngram import NgramDrafter
from quasar_core.models.hf.causal_lm import TransformersLM, attach_verifier
from quasar_core.models.pair import load_tokenizer

COUNT = 24
DEMO = Path(quasar_core.demo.__file__).parent / "model"


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_equals_transformers(architecture: str, drafter: str) -> None:
    """Drafts of every length from 1 to 8: the even ones or the odd ones, in turn."""
    pair, expected = make_pair(random_model(architecture)), greedy_reference(architecture, COUNT)
    make_draft = drafter_factory(drafter, PROMPT + expected)
    for drafts in range(1 + (ARCHITECTURES.index(architecture) + DRAFTERS.index(drafter)) % 2, 9, 2):
        result = generate(pair, "full", drafts, make_draft=make_draft)
        assert result.token_ids == expected, drafts
        assert result.stats.new_tokens == 1 + result.stats.steps + result.stats.accepted


def test_drafts_are_accepted_when_right_and_refused_when_wrong() -> None:
    expected = PROMPT + greedy_reference("llama", COUNT)
    right = generate(make_pair(random_model("llama")), "full", 4, make_draft=drafter_factory("oracle", expected))
    wrong = generate(make_pair(random_model("llama")), "full", 4, make_draft=drafter_factory("wrong", expected))
    assert right.stats.acceptance_rate == 1.0
    assert right.stats.steps == 5  # 23 tokens, at most 5 of a step
    assert wrong.stats.acceptance_rate == 0.0
    assert wrong.stats.steps == COUNT - 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exact_equals_transformers(architecture: str) -> None:
    """Every second window from 1 to 12; draft lengths from 1 to 8, drafters and verifiers take turns."""
    pairs = [make_pair(random_model(architecture), verifier_of(architecture, kind)) for kind in ("4", "random")]
    expected = greedy_reference(architecture, 16)
    for window in range(1 + ARCHITECTURES.index(architecture) % 2, 13, 2):
        drafts, kind = 1 + (3 * window) % 8, DRAFTERS[window % 3]
        make_draft = drafter_factory(kind, PROMPT + expected)
        result = generate(pairs[window // 3 % 2], "exact", drafts, window, 16, make_draft)
        assert result.token_ids == expected, (window, drafts, kind)


@pytest.mark.parametrize("kind", DRAFTERS)
@pytest.mark.parametrize("noise", [0.3, 3.0])
@pytest.mark.parametrize("share", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_exact_equals_plain_decoding_at_every_length_and_window(share: int, kind: str, noise: float) -> None:
    """The grid or a third of it, on models that are tables; with the larger noise the verifier is mostly wrong."""
    target = TableModel(VOCABULARY, seed=0)
    pair = make_pair(target, target.disturbed(noise))
    expected = greedy_by_hand(target, target, 20)
    make_draft = drafter_factory(kind, PROMPT + expected)
    for drafts in range(1, 9):
        for window in range(1 + drafts % share, 13, share):
            assert generate(pair, "exact", drafts, window, 20, make_draft).token_ids == expected, (drafts, window)


@pytest.mark.parametrize("kind", DRAFTERS)
@pytest.mark.parametrize("noise", [0.3, 3.0])
@pytest.mark.parametrize("decisions", ["target", "verifier", "both"])
@pytest.mark.parametrize("seeds", [4, pytest.param(12, marks=pytest.mark.slow)])
def test_whoever_checks_a_draft_the_text_is_plain_decodings(
    seeds: int, kind: str, noise: float, decisions: str
) -> None:
    """Decisions are the target's, the verifier's, or drawn at random, with lengths drawn at random too."""
    target = TableModel(VOCABULARY, seed=0)
    pair, expected = make_pair(target, target.disturbed(noise)), greedy_by_hand(target, target, 40)
    for seed in range(seeds):
        drafter = drafter_factory(kind, PROMPT + expected)()
        engine = routed_engine(pair, drafter, drawn_decisions(seed, decisions), 40)
        engine.prefill(PROMPT)
        while engine.committed < engine.max_tokens:
            engine.step()
        assert engine.tokens[len(PROMPT) :] == expected, seed
        steps, confirms = engine.stats.step_log, engine.stats.confirm_log
        assert sum(step.by_target for step in steps) + len(confirms) > 0
        assert all(step.by_target for step in steps) == (decisions == "target")


def test_exact_with_a_perfect_verifier_confirms_whole_windows() -> None:
    expected = greedy_reference("llama", COUNT)
    pair = make_pair(random_model("llama"), random_model("llama"))
    result = generate(pair, "exact", window=6, draft="none")
    assert result.token_ids == expected
    assert result.stats.confirm_rate == 1.0
    assert [confirm.window for confirm in result.stats.confirm_log] == [6, 6, 6, 2]


@pytest.mark.parametrize("verify", ["full", "exact"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_repetition_penalty_equals_transformers(architecture: str, verify: str) -> None:
    pair = make_pair(random_model(architecture), quantized_copy(architecture, 8))
    expected = greedy_reference(architecture, COUNT, penalty=1.4)
    assert expected != greedy_reference(architecture, COUNT)
    for drafts, kind in enumerate(DRAFTERS, start=2):
        make_draft = drafter_factory(kind, PROMPT + expected)
        sampling = SamplingConfig(repetition_penalty=1.4)
        result = generate(pair, verify, drafts, 5, make_draft=make_draft, sampling=sampling)
        assert result.token_ids == expected


def test_after_every_step_drafter_and_cache_hold_the_text() -> None:
    """The drafter has seen every token; the cache, every token but the last."""
    target = TableModel(VOCABULARY, seed=0)
    pair, drafter, limit = make_pair(target, target.disturbed(2.0)), NgramDrafter(), len(PROMPT) + 60
    cache: Any = target.new_cache(limit)
    engine = Engine(pair, cache, GenerationConfig(60), drafter, FixedLength(3), WindowPolicy(5), limit)
    engine.prefill(PROMPT)
    while engine.committed < limit:
        assert drafter.context == engine.tokens
        assert cache.tokens == engine.tokens[:-1]
        assert engine.committed + len(engine.window) == len(engine.tokens)
        engine.step()
    assert 0 < engine.stats.confirm_accepted < engine.stats.confirm_window


def test_quantized_is_the_verifiers_text_after_the_targets_prompt() -> None:
    target, verifier = random_model("qwen2"), quantized_copy("qwen2")
    expected = greedy_by_hand(target, verifier, COUNT)
    assert expected != greedy_reference("qwen2", COUNT)
    for drafts, kind in enumerate(DRAFTERS, start=3):
        make_draft = drafter_factory(kind, PROMPT + expected)
        assert generate(make_pair(target, verifier), "quantized", drafts, make_draft=make_draft).token_ids == expected


@pytest.mark.skipif(not (DEMO / "model.safetensors").exists(), reason="the demo model is not in this checkout")
def test_the_demo_model_writes_what_transformers_writes() -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    tokenizer = load_tokenizer(DEMO)
    texts = [f"def read_{what}(path):\n    " for what in ("lines", "words", "numbers", "names", "json", "keys")]
    prompt = clear_prompt(model, (tokenizer(text)["input_ids"] for text in texts), COUNT)
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=COUNT,
        eos_token_id=None,
    )
    expected = output[0, len(prompt) :].tolist()
    target = TransformersLM(model)
    checkpoint: Any = RoundedCheckpoint(target, bits=4, group_size=128)
    verifier = attach_verifier(target, checkpoint, "reference")
    pair = make_pair(target, verifier, tokenizer=tokenizer, max_context=512)
    for verify, drafts, window in (("full", 5, 1), ("exact", 3, 6)):
        config = GenerationConfig(COUNT, verify, num_draft_tokens=drafts, window=window)  # type: ignore[arg-type]
        assert Generator(pair, config).generate(prompt).token_ids == expected
