"""The text part of a multimodal folder runs on our own decoder, is quantized, and what is beside it is kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.decoder_cases import CPU, FLOAT, assert_close, fresh_logits, in_passes, random_tokens
from helpers.families import greedy
from helpers.multimodal_models import MODELS, add_tensors, save_multimodal
from helpers.quantize_cases import CONFIG
from safetensors.torch import load_file, save_file

from quasar_core.api import decoding, measuring, quantizing
from quasar_core.checkpoint.loaders import Config
from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.config import GenerationConfig
from quasar_core.decode.generator import Generator
from quasar_core.errors import QuasarError
from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.pair import Pair
from quasar_core.models.weights.lean_weights import load_target
from quasar_core.store.text_part import CLASSES, SIZES, USUAL_SIZES, text_part

pytest_plugins = ["helpers.quantize_fixtures"]
IDS = list(range(40, 60))
LENGTH = 24
WEIGHTS = "model.safetensors"


def load(folder: Path, verify: str, **options: Any) -> Pair:
    return decoding.load_pair(str(folder), verify=verify, device="cpu", dtype="float32", **options)  # type: ignore[arg-type]


def generate(pair: Pair, verify: str) -> list[int]:
    config = GenerationConfig(LENGTH, verify, "ngram", num_draft_tokens=3, window=4, ignore_eos=True)  # type: ignore[arg-type]
    return list(Generator(pair, config).generate(IDS).token_ids)


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_the_multimodal_model(name: str, tmp_path: Path) -> None:
    model = save_multimodal(tmp_path, name)
    decoder, tokens = load_target(tmp_path, CPU, FLOAT), random_tokens()
    expected = fresh_logits(model, tokens)
    assert_close(in_passes(decoder, tokens, [12, 1, 4, 8]), expected, family=MODELS[name][0])
    cache = decoder.new_cache(64)
    decoder.forward([*tokens[:20], 5, 6, 7], cache)
    cache.rollback(20)
    assert_close(decoder.forward(tokens[20:], cache), expected[20:], family=MODELS[name][0])


@pytest.mark.usefixtures("small_texts")
@pytest.mark.parametrize("name", ["qwen3.5", "gemma 3", "gemma 4", "mistral small 3.1", "muse glimmer"])
def test_its_text_is_the_multimodal_models_and_a_verifier_keeps_what_is_beside(name: str, tmp_path: Path) -> None:
    model = save_multimodal(tmp_path / "m", name)
    expected = greedy(model, IDS, LENGTH)
    head = {"mtp.fc.weight": torch.ones(64, 128)}
    add_tensors(tmp_path / "m", head)
    own = load_file(tmp_path / "m" / WEIGHTS)
    checkpoint = Path(quantizing.quantize(str(tmp_path / "m"), CONFIG, device="cpu").checkpoint)
    stored = load_file(checkpoint / WEIGHTS)
    packed = {key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")}
    assert packed
    assert all("language_model." in key for key in packed)
    assert {key for key in own if key.removesuffix(".weight") not in packed} <= stored.keys()
    assert torch.equal(stored["mtp.fc.weight"], head["mtp.fc.weight"])
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    section = Config.of(config["quantization_config"])
    beside = [key for key in own if "language_model." not in key and "lm_head" not in key]
    assert all(section.width(key.removesuffix(".weight")) is None for key in beside)
    assert all(section.width(key) == section.usual for key in packed)
    pair = load(tmp_path / "m", "exact")
    assert "decoder: our own" in pair.notes
    assert generate(pair, "exact") == expected
    assert generate(pair, "full") == expected
    alone = load(tmp_path / "m", "quantized", use_target=False)
    assert len(generate(alone, "quantized")) == LENGTH
    assert measuring.inspect(str(checkpoint))["packed_layers"] == len(packed)


@pytest.mark.usefixtures("small_texts")
def test_a_text_part_that_is_not_of_the_table_runs_through_transformers(tmp_path: Path) -> None:
    model = save_multimodal(tmp_path / "m", "gemma 3")
    path = tmp_path / "m" / "config.json"
    content = json.loads(path.read_text())
    content["text_config"]["hidden_activation"] = "gelu"
    path.write_text(json.dumps(content))
    model = type(model).from_pretrained(tmp_path / "m", dtype=torch.float32)
    quantizing.quantize(str(tmp_path / "m"), CONFIG, device="cpu")
    pair = load(tmp_path / "m", "exact")
    assert "decoder: transformers, as it has no activation gelu" in pair.notes
    assert generate(pair, "exact") == greedy(model, IDS, LENGTH)
    assert len(generate(load(tmp_path / "m", "quantized", use_target=False), "quantized")) == LENGTH


def test_heads_of_further_tokens_beside_a_text_model_are_no_obstacle(tmp_path: Path) -> None:
    model = save_multimodal(tmp_path, "qwen3.5")
    tensors = {TensorFiles(tmp_path).own(key): value for key, value in load_file(tmp_path / WEIGHTS).items()}
    tensors = {key: value for key, value in tensors.items() if "visual" not in key} | {
        "mtp.norm.weight": torch.ones(64)
    }
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    config = text_part(json.loads((tmp_path / "config.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps(config))
    pair = load(tmp_path, "full")
    assert "decoder: our own" in pair.notes
    assert generate(pair, "full") == greedy(model, IDS, LENGTH)


def test_sizes_that_a_config_leaves_out_are_those_of_transformers() -> None:
    for kind, sizes in USUAL_SIZES.items():
        theirs = transformers.AutoConfig.for_model(kind).to_dict()
        assert {name: theirs[name] for name in SIZES} == dict(zip(SIZES, sizes, strict=True)), kind
        assert hasattr(transformers, CLASSES[kind]) or CLASSES[kind] == "MuseGlimmerForCausalLM"  # which is our own


def test_gemma_3_as_its_4b_is_published() -> None:
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    config = DecoderConfig.parse(text_part(whole))
    assert (config.vocab_size, config.num_heads, config.num_kv_heads, config.head_size) == (262_208, 8, 4, 256)
    assert config.tied
    assert [rope.kind for rope in config.ropes] == ["linear", "default"]
    assert config.windows[:6] == (1024,) * 5 + (None,)


def test_muse_glimmer_as_its_30b_is_published() -> None:
    whole = {
        "architectures": ["MuseGlimmerForConditionalGeneration"],
        "model_type": "muse_glimmer",
        "text_config": {"model_type": "muse_glimmer_text"},
    }
    config = DecoderConfig.parse(text_part(whole))
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_size) == (52, 32, 2, 128)
    assert config.windows == (2048, 2048, 2048, None) * 13
    assert [block.rope for block in config.blocks] == [0, 0, 0, None] * 13
    assert config.scores_scale == pytest.approx(3.87 / 128**0.5)
    assert not config.tied


def test_a_tensor_under_both_prefixes_is_refused(tmp_path: Path) -> None:
    save_multimodal(tmp_path, "qwen3.5")
    add_tensors(tmp_path, {"language_model.model.norm.weight": torch.ones(64)})
    with pytest.raises(QuasarError, match=r"holds model\.norm\.weight twice"):
        TensorFiles(tmp_path)
