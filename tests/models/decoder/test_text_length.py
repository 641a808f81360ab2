"""Rotary embeddings that depend on the text's length: decoding equals transformers' `generate` across the limit."""

import copy
import inspect
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import CPU, FLOAT, assert_close, fresh_logits, random_tokens, save_model
from helpers.quantized_decoder import quantize_layers
from helpers.tiny_models import DRAFTERS, RoundedCheckpoint, drafter_factory, make_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PhimoeConfig, PhimoeForCausalLM

from quasar_core.config import GenerationConfig
from quasar_core.decode import engine
from quasar_core.decode.generator import Generator
from quasar_core.errors import QuasarError
from quasar_core.models import loading
from quasar_core.models.decoder.cache import DecoderCache
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.decoder.two_tables import TwoTableCache
from quasar_core.models.hf.causal_lm import TransformersLM, attach_verifier
from quasar_core.models.rope import spans
from quasar_core.models.weights import lean_weights

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
    turn = PROMPTS.index(length) + list(MODELS).index(name)  # of the drafters: each length and each model has all
    for number, verify in enumerate(("exact", "full")):
        which = (turn + number) % len(DRAFTERS)
        config = GenerationConfig(COUNT, verify, num_draft_tokens=3 + which, window=6)  # type: ignore[arg-type]
        make_draft = drafter_factory(DRAFTERS[which], prompt + expected)
        assert answer(Generator(pair, config, make_draft), prompt) == expected, (DRAFTERS[which], verify)


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


PHI: dict[str, Any] = {
    **MODELS["phi3"][2],
    "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.5},
    "partial_rotary_factor": 0.5,
}
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": ("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": LIMIT}),
    "longrope": ("Phi3", PHI),
}


@pytest.fixture(scope="module", params=OWN)
def own(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, list[list[int]]]:
    """The kind, its files, and what transformers writes behind a prompt of each length."""
    folder = tmp_path_factory.mktemp("own")
    model, texts = save_model(folder, *OWN[request.param]), []
    for length in PROMPTS:
        ids = torch.tensor([text_of(length)])
        output = copy.deepcopy(model).generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=COUNT, eos_token_id=96
        )
        texts.append(output[0, length:].tolist())
    return request.param, folder, texts


@pytest.mark.parametrize("chunk", [512, 7])
@pytest.mark.parametrize("is_fast", [False, True])
def test_our_own_decoder_equals_transformers(
    own: tuple[str, Path, list[list[int]]], is_fast: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engine.PREFILL_CHUNK, "cpu", chunk)
    kind, folder, texts = own
    decoder = lean_weights.load_target(folder, CPU, FLOAT)
    if is_fast:
        loading.attach(decoder)
    pair = make_pair(decoder, max_context=LONGEST)
    for length, expected in zip(PROMPTS, texts, strict=True):
        if kind == "longrope" and "phi3" in FORGETS and length <= LIMIT < length + COUNT - 1:
            continue
        prompt = text_of(length)
        for drafts, drafter in enumerate(DRAFTERS, start=3):
            config = GenerationConfig(COUNT, "full", num_draft_tokens=drafts)
            make_draft = drafter_factory(drafter, prompt + expected)
            assert answer(Generator(pair, config, make_draft), prompt) == expected, (length, drafter)


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LeanDecoder, LeanDecoder]:
    """A model whose rotations change at the limit: transformers', ours, and a verifier."""
    folder = tmp_path_factory.mktemp("phi")
    model = save_model(folder, *OWN["longrope"])
    target = lean_weights.load_target(folder, CPU, FLOAT)
    codes = quantize_layers(folder, folder / "codes", lambda name: 16 if name == "lm_head.weight" else 4)
    return model, target, lean_weights.attach_verifier(target, codes, "reference")


@settings(max_examples=6, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(1, 14), st.integers(0, 14)), min_size=1, max_size=4), prompt=st.booleans())
def test_every_row_is_that_of_the_text_that_ends_with_it(
    phi: tuple[Any, LeanDecoder, LeanDecoder], steps: list[tuple[int, int]], prompt: bool
) -> None:
    """On both sides of the limit, in passes that cross it, after going back across it; by whole texts."""
    model, target, _ = phi
    cache, text = target.new_cache(LONGEST), list[int]()
    first = LIMIT + 1 if prompt else 1
    cache.begin(first)
    for number, (size, back) in enumerate([(first, 0), *steps]):
        new = random_tokens(size, seed=number)
        rows = target.forward(new, cache)
        text += new
        ends = range(len(text) - size + 1, len(text) + 1) if number else [len(text)]
        assert_close(rows[-len(ends) :], torch.cat([fresh_logits(model, text[:end])[-1:] for end in ends]))
        cache.rollback(max(len(text) - back, first))
        del text[cache.length :]


def test_texts_within_the_limit_have_one_cache_and_chains(phi: tuple[Any, LeanDecoder, LeanDecoder]) -> None:
    _, target, _ = phi
    assert isinstance(target.new_cache(LIMIT), DecoderCache)
    cache = target.new_cache(LIMIT + 1)
    assert isinstance(cache, TwoTableCache)
    assert target.longest_tree == 0
    assert target.why_chains == f"rotations change at {LIMIT} tokens, and a tree may stand on both sides"
    with pytest.raises(QuasarError, match=f"The cache holds {LIMIT + 1} tokens, and {LIMIT + 2} are needed"):
        target.forward(text_of(LIMIT + 2), cache)
    with pytest.raises(ValueError, match="cannot move a cache of 0 positions to 1"):
        cache.rollback(1)
    config = GenerationConfig(5, "full", "layer-skip", num_draft_tokens=3)
    with pytest.raises(QuasarError, match=f"this model's keys are computed anew at {LIMIT} tokens"):
        Generator(make_pair(target), config)


def test_exact_is_the_models_own_text_across_the_limit(phi: tuple[Any, LeanDecoder, LeanDecoder]) -> None:
    _, target, verifier = phi
    pair = make_pair(target, verifier, max_context=LONGEST)
    first = text_of(LIMIT - 12)
    plain = Generator(pair, GenerationConfig(COUNT, "full", "none"))
    texts = [(first, answer(plain, first))]
    second = [*first, *texts[0][1], *text_of(4, 2)]
    texts += [(prompt, answer(plain, prompt)) for prompt in (second, second[: LIMIT - 5], second[: LIMIT + 3], first)]
    for drafts, kind in enumerate(DRAFTERS, start=3):
        for prompt, expected in texts:
            config = GenerationConfig(COUNT, "exact", num_draft_tokens=drafts, window=6)
            assert answer(Generator(pair, config, drafter_factory(kind, prompt + expected)), prompt) == expected
    turns = Generator(pair, GenerationConfig(COUNT, "exact", num_draft_tokens=3, window=5))
    for prompt, expected in texts:
        assert answer(turns, prompt) == expected


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
