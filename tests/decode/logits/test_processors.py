"""Logits processors of generation_config.json: with them decoding is, token for token, transformers' `generate`."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import (
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
)
from transformers import GenerationConfig as TheirConfig

from quasar_core.config import GenerationConfig, SamplingConfig
from quasar_core.decode.generator import Generator
from quasar_core.decode.logits.processors import OPTIONS, Processors, read_processors
from quasar_core.errors import QuasarError

COUNT = 20
CPU = torch.device("cpu")
FREE = greedy_reference("llama", COUNT)  # without any processor
END = FREE[4]
CASES: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.4},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.8},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[FREE[0]], FREE[1:3], FREE[4:7]]},
    "sequence_bias": {"sequence_bias": [[[FREE[2]], -30.0], [FREE[:2], 9.0], [[3, 7], 4.0]]},
    "min_length": {"min_length": len(PROMPT) + 9},
    "min_new_tokens": {"min_new_tokens": 9},
    "forced_eos_token_id": {"forced_eos_token_id": 50},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": [0, 4.0]},
    "suppress_tokens": {"suppress_tokens": sorted(set(FREE[:5]))},
    "begin_suppress_tokens": {"begin_suppress_tokens": [FREE[0], FREE[1]]},
    "many at once": {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "suppress_tokens": [FREE[0]],
        "min_new_tokens": 6,
        "sequence_bias": [[[5], 2.0]],
    },
}


def theirs(options: dict[str, Any], prompt: list[int], eos: list[int] | None) -> list[int]:
    """What a model with this generation config writes."""
    return list(_theirs(json.dumps(options), tuple(prompt), tuple(eos or ())))


@cache
def _theirs(named: str, prompt: tuple[int, ...], eos: tuple[int, ...]) -> list[int]:
    options, ends = json.loads(named), [*eos] or None
    model = copy.copy(random_model("llama").model)
    model.generation_config = TheirConfig(**options, eos_token_id=ends, pad_token_id=0)
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=COUNT)
    return list(output[0, len(prompt) :].tolist())


def ours(pair: Any, prompt: list[int], drafts: int, kind: str, expected: list[int], **options: Any) -> list[int]:
    config = GenerationConfig(COUNT, num_draft_tokens=drafts, window=5, **options)
    make = drafter_factory(kind, prompt + expected)
    return list(Generator(pair, config, make).generate(prompt).token_ids)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("eos", [None, [END, 90]], ids=["no end", "two ends"])
def test_every_processor_equals_transformers(name: str, eos: list[int] | None) -> None:
    options, prompt = CASES[name], PROMPT
    if eos is None and name == "exponential_decay_length_penalty":
        pytest.skip("transformers asks for an end of text")
    expected = theirs(options, prompt, eos)
    pair = make_pair(random_model("llama"), quantized_copy("llama"), eos_ids=frozenset(eos or []), processors=options)
    turn = (list(CASES).index(name) + bool(eos)) % len(DRAFTERS)  # of the drafters: which one drafts for `full`
    once = eos and name != "exponential_decay_length_penalty"  # where all have drafted for the case without an end
    for drafts, kind in enumerate(DRAFTERS, start=3):
        modes = ("full", "exact") if kind == DRAFTERS[turn] else () if once else ("exact",)
        for verify in modes:
            assert ours(pair, prompt, drafts, kind, expected, verify=verify) == expected, (kind, verify)


def test_the_cases_cover_every_option_and_change_the_text() -> None:
    assert {name for options in CASES.values() for name in options} == OPTIONS.keys() - {"forced_bos_token_id"}
    needs_end = {"min_length", "min_new_tokens", "exponential_decay_length_penalty"}
    for name, options in CASES.items():
        eos = [END] if name in needs_end else None
        changed = theirs(options, PROMPT, eos) != theirs({}, PROMPT, eos)
        assert changed or name == "remove_invalid_values", name


@pytest.mark.parametrize("verify", ["full", "exact"])
def test_a_forced_second_token_equals_transformers(verify: str) -> None:
    options = {"forced_bos_token_id": 33, "begin_suppress_tokens": [theirs({"forced_bos_token_id": 33}, [7], None)[1]]}
    expected = theirs(options, [7], None)
    assert expected[0] == 33
    pair = make_pair(random_model("llama"), quantized_copy("llama"), processors=options)
    assert ours(pair, [7], 4, "oracle", expected, verify=verify) == expected


def test_the_verifiers_text_is_processed_too() -> None:
    """With a verifier that equals the target, `quantized` writes what transformers writes."""
    options = CASES["many at once"]
    expected = theirs(options, PROMPT, None)
    pair = make_pair(random_model("llama"), random_model("llama"), processors=options)
    assert ours(pair, PROMPT, 4, "ngram", expected, verify="quantized") == expected


@pytest.mark.parametrize("name", ["no_repeat_ngram_size", "sequence_bias", "repetition_penalty"])
def test_exact_samples_from_the_processed_distribution(name: str) -> None:
    """A temperature near 0 leaves one token, so sampling through p and q must write the greedy text."""
    expected = theirs(CASES[name], PROMPT, None)
    pair = make_pair(random_model("llama"), quantized_copy("llama"), processors=CASES[name])
    for verify in ("full", "exact"):
        sampling = SamplingConfig(temperature=1e-6)
        assert ours(pair, PROMPT, 4, "oracle", expected, verify=verify, sampling=sampling) == expected


def test_a_token_that_is_suppressed_is_never_drawn() -> None:
    target = TableModel(VOCABULARY, seed=0)
    suppressed = list(range(0, VOCABULARY, 2))
    pair = make_pair(target, target.disturbed(2.0), processors={"suppress_tokens": suppressed})
    for verify in ("full", "exact", "quantized"):
        result = generate(pair, verify, 4, 4, 60, sampling=SamplingConfig(temperature=1.5, seed=3))
        assert not set(result.token_ids) & set(suppressed)


def test_rows_of_a_pass_are_processed_as_one_by_one() -> None:
    prefix, continuation = [3, 9, 3], [11, 4, 11, 30]
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    options = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "suppress_tokens": [4], "min_length": 6}
    processors = Processors(options, GenerationConfig())
    processors.begin(prefix, 20, frozenset([11]), CPU)
    before = logits.clone()
    rows = processors(logits, prefix, continuation)
    assert torch.equal(logits, before)
    for i in range(5):
        alone = processors(logits[i : i + 1], prefix + continuation[:i], [])
        assert torch.equal(rows[i : i + 1], alone)


def test_the_command_lines_penalty_stands_in_the_place_of_the_models() -> None:
    pair = make_pair(random_model("llama"), processors={"repetition_penalty": 1.4})
    for penalty in (1.0, 1.2):
        expected = theirs({"repetition_penalty": penalty}, PROMPT, None)
        sampling = SamplingConfig(repetition_penalty=penalty)
        assert ours(pair, PROMPT, 4, "ngram", expected, verify="full", sampling=sampling) == expected
    expected = theirs({"repetition_penalty": 1.4}, PROMPT, None)
    assert ours(pair, PROMPT, 4, "ngram", expected, verify="full") == expected


def test_processors_are_left_out_when_asked_and_either_way_it_is_noted() -> None:
    pair = make_pair(random_model("llama"), processors=CASES["many at once"])
    assert ours(pair, PROMPT, 4, "ngram", FREE, verify="full", processors=False) == FREE
    assert pair.notes == [
        "processors: left out, as asked: repetition_penalty, no_repeat_ngram_size, suppress_tokens, min_new_tokens, "
        "sequence_bias"
    ]
    pair.notes.clear()
    Generator(pair, GenerationConfig(8, "full", num_draft_tokens=2))
    assert "processors: sequence_bias [[[5], 2.0]], repetition_penalty 1.2" in pair.notes[0]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_beams": 4}, "num_beams 4"),
        ({"watermarking_config": {"bias": 2.5}}, "watermarking_config"),
        ({"guidance_scale": 1.5}, "guidance_scale 1.5"),
        ({"repetition_penalty": "much"}, "repetition_penalty"),
        ({"repetition_penalty": -1}, "repetition_penalty"),
        ({"no_repeat_ngram_size": 2.5}, "no_repeat_ngram_size"),
        ({"bad_words_ids": [[VOCABULARY + 3]]}, "bad_words_ids"),
        ({"bad_words_ids": [5]}, "bad_words_ids"),
        ({"sequence_bias": []}, "sequence_bias"),
        ({"suppress_tokens": "a"}, "suppress_tokens"),
        ({"exponential_decay_length_penalty": 3}, "exponential_decay_length_penalty"),
    ],
    ids=str,
)
def test_what_cannot_be_applied_is_refused_by_name(options: dict[str, Any], named: str) -> None:
    pair = make_pair(random_model("llama"), eos_ids=frozenset([3]), processors=options)
    with pytest.raises(QuasarError, match=f"{named}.*--no-processors"):
        Generator(pair, GenerationConfig(8, "full", num_draft_tokens=2))
    assert ours(pair, PROMPT, 4, "ngram", FREE, verify="full", processors=False, ignore_eos=True) == FREE


def test_options_are_read_from_the_generation_config_or_else_from_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"repetition_penalty": 1.3, "text_config": {"min_length": 4}}))
    assert read_processors(tmp_path) == {"repetition_penalty": 1.3, "min_length": 4}
    idle = {"repetition_penalty": 1.0, "num_beams": 1, "no_repeat_ngram_size": 0, "temperature": 0.7, "min_length": 0}
    (tmp_path / "generation_config.json").write_text(json.dumps({**idle, "guidance_scale": 2.0}))
    assert read_processors(tmp_path) == {"guidance_scale": 2.0}


def test_without_processors_the_logits_are_left_as_they_are() -> None:
    logits = torch.zeros(2, 5)
    processors = Processors({}, GenerationConfig(sampling=SamplingConfig(repetition_penalty=1.0)))
    processors.begin([1], 9, frozenset(), CPU)
    assert not processors
    assert processors(logits, [1, 2], [3]) is logits


def test_a_verifier_of_its_own_is_no_excuse() -> None:
    """`quantized` from a table model: the greedy text of the processed table."""
    target = TableModel(VOCABULARY, seed=0)
    expected = greedy_by_hand(target, target, 12)
    pair = make_pair(target, target, processors={"suppress_tokens": [expected[3]]})
    assert expected[3] not in generate(pair, "quantized", count=12).token_ids
