"""Rotary embeddings that depend on the text's length: decoding equals transformers' `generate` across the limit."""

import copy
import inspect
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import CPU, FLOAT, save_model
from helpers.tiny_models import DRAFTERS, RoundedCheckpoint, drafter_factory, make_pair
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PhimoeConfig, PhimoeForCausalLM

from quasar_core.config import GenerationConfig
from quasar_core.decode import engine
from quasar_core.decode.generator import Generator
from quasar_core.models import lean_weights, loading
from quasar_core.models.hf.causal_lm import TransformersLM, attach_verifier
from quasar_core.models.rope import spans

LIMIT, LONGEST, COUNT, VOCABULARY = 24, 96, 14, 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [3.0, 5.0, 9.0, 20.0],
    "rope_theta": 1e4,
    "original_max_position_embeddings": LIMIT,
}
MOE = {"short_mscale": 1.1, "long_mscale": 1.6}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "phi3": (
        Phi3Config,
        Phi3ForCausalLM,
        {
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": LIMIT,
            "max_position_embeddings": LONGEST,
            "sliding_window": None,
        },
    ),
    "phimoe": (
        PhimoeConfig,
        PhimoeForCausalLM,
        {
            "rope_parameters": {**LONGROPE, **MOE},
            "original_max_position_embeddings": LIMIT,
            "max_position_embeddings": LONGEST,
            "num_local_experts": 2,
            "sliding_window": None,
        },
    ),
    "llama, longrope": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": LONGROPE, "max_position_embeddings": LONGEST},
    ),
    "llama, dynamic": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": DYNAMIC, "max_position_embeddings": LIMIT}),
}
# Within the limit, across it while decoding, the last prompt within it, the first beyond it, well beyond it.
PROMPTS = (3, LIMIT - 9, LIMIT - 1, LIMIT, LIMIT + 1, LIMIT + 17)


# In older versions `generate` of Phi-3 forgets the text at the limit where newer ones compute its keys anew.
FORGETS = {"phi3", "phimoe"} if "next_sequence_length" not in inspect.getsource(Phi3ForCausalLM) else set()


@cache
def fresh(name: str) -> Any:
    config_class, model_class, options = MODELS[name]
    torch.manual_seed(3)
    model = model_class(config_class(**SIZES, **options)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" not in key:
                parameter.normal_(0, 0.3)
    return model


def text_of(length: int, seed: int = 1) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@cache
def reference(name: str, prompt: tuple[int, ...]) -> list[int]:
    """What a model that was just loaded writes: dynamic NTK remembers the longest text since."""
    if name in FORGETS and len(prompt) <= LIMIT < len(prompt) + COUNT - 1:
        pytest.skip("generate of this version of transformers forgets the text at the limit")
    ids = torch.tensor([prompt])
    model = copy.deepcopy(fresh(name))
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=COUNT)
    return list(output[0, len(prompt) :].tolist())


def pair_of(name: str, target: TransformersLM | None = None) -> Any:
    target = target or TransformersLM(copy.deepcopy(fresh(name)))
    checkpoint: Any = RoundedCheckpoint(target, 4)
    checkpoint.layers = {key: value for key, value in checkpoint.layers.items() if "experts" not in key}
    checkpoint.layer_names = [key for key in checkpoint.layer_names if "experts" not in key and "router" not in key]
    return make_pair(target, attach_verifier(target, checkpoint, "reference"), max_context=LONGEST)


def answer(generator: Generator, prompt: list[int]) -> list[int]:
    return list(generator.generate(prompt).token_ids)


@pytest.mark.parametrize("length", PROMPTS)
@pytest.mark.parametrize("name", MODELS)
def test_decoding_equals_transformers_across_the_limit(name: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engine.PREFILL_CHUNK, "cpu", 7)  # a prompt in several passes; in one below
    prompt = text_of(length)
    expected, pair = reference(name, tuple(prompt)), pair_of(name)
    plain = GenerationConfig(COUNT, "full", "none", num_draft_tokens=4)
    assert answer(Generator(pair, plain), prompt) == expected
    turn = PROMPTS.index(length) + list(MODELS).index(name)  # of the drafters: which one drafts for `full`
    for drafts, kind in enumerate(DRAFTERS, start=3):
        make_draft = drafter_factory(kind, prompt + expected)
        configs = [GenerationConfig(COUNT, "exact", num_draft_tokens=drafts, window=6)]
        if kind == DRAFTERS[turn % len(DRAFTERS)]:
            configs.append(GenerationConfig(COUNT, "full", num_draft_tokens=drafts))
        for config in configs:
            assert answer(Generator(pair, config, make_draft), prompt) == expected, (kind, config.verify)


@pytest.mark.parametrize("name", MODELS)
def test_each_turn_of_a_conversation_equals_transformers(name: str) -> None:
    """The cache is kept between turns, and a later text may be shorter than the one before it."""
    generator = Generator(pair_of(name), GenerationConfig(COUNT, "exact", num_draft_tokens=3, window=5))
    first = text_of(LIMIT - 12)
    second = [*first, *reference(name, tuple(first)), *text_of(4, 2)]
    for prompt in (first, second, second[: LIMIT - 5], second[: LIMIT + 3], first):
        assert answer(generator, prompt) == reference(name, tuple(prompt)), len(prompt)


@pytest.mark.parametrize("name", MODELS)
def test_what_the_verifier_writes_does_not_depend_on_drafts(name: str) -> None:
    pair, prompt = pair_of(name), text_of(LIMIT - 9)
    plain = answer(Generator(pair, GenerationConfig(COUNT, "quantized", "none", num_draft_tokens=2)), prompt)
    for drafts, kind in enumerate(DRAFTERS, start=3):
        config = GenerationConfig(COUNT, "quantized", num_draft_tokens=drafts)
        assert answer(Generator(pair, config, drafter_factory(kind, prompt + plain)), prompt) == plain


@pytest.mark.parametrize("chunk", [512, 7])
@pytest.mark.parametrize("is_fast", [False, True])
def test_our_own_decoder_equals_transformers_with_dynamic_scaling(
    is_fast: bool, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engine.PREFILL_CHUNK, "cpu", chunk)
    model = save_model(tmp_path, "Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": LIMIT})
    decoder = lean_weights.load_target(tmp_path, CPU, FLOAT)
    if is_fast:
        loading.attach(decoder)
    pair = make_pair(decoder, max_context=LONGEST)
    for length in PROMPTS:
        ids = torch.tensor([text_of(length)])
        output = copy.deepcopy(model).generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=COUNT, eos_token_id=96
        )
        expected = output[0, length:].tolist()
        for drafts, kind in enumerate(DRAFTERS, start=3):
            config = GenerationConfig(COUNT, "full", num_draft_tokens=drafts)
            make_draft = drafter_factory(kind, ids[0].tolist() + expected)
            assert answer(Generator(pair, config, make_draft), ids[0].tolist()) == expected, (length, kind)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = copy.deepcopy(fresh(name))
    pair = pair_of(name, TransformersLM(model))
    prompt = text_of(LIMIT - 3)
    answer(Generator(pair, GenerationConfig(COUNT, "exact", num_draft_tokens=3, window=5)), prompt)
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=COUNT)
    assert output[0, len(prompt) :].tolist() == reference(name, tuple(prompt))


def test_positions_of_a_pass_by_text_length() -> None:
    assert list(spans(2, 5, 0, 10)) == [(2, 5, 10)]
    assert list(spans(8, 12, 0, 10)) == [(8, 10, 10), (10, 11, 11), (11, 12, 12)]
    assert list(spans(8, 13, 12, 10)) == [(8, 12, 12), (12, 13, 13)]
    assert list(spans(3, 5, 12, 10)) == [(3, 5, 12)]
