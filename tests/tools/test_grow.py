"""Grown models: the small model's function at another shape, and the shapes themselves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import CPU, FLOAT, random_prompts, save_model
from helpers.near_ties import clear_prompt
from transformers import AutoModelForCausalLM

from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.errors import UsageError
from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.config.shapes import SHAPES, shape_named
from quasar_core.models.weights.lean_weights import load_target
from tools.demo import grow as growing

QWEN3_HALF_B = {**SHAPES["qwen3-0.6b"], "num_hidden_layers": 7, "intermediate_size": 640, "vocab_size": 2560}
SMALL = {**QWEN3_HALF_B, "hidden_size": 320, "intermediate_size": 128, "num_hidden_layers": 6, "vocab_size": 128}
TARGETS: dict[str, dict[str, Any]] = {
    "the same heads": {"head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2},
    "wider heads, tied": {"head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 4},
    "larger groups, untied": {"num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": False},
    "one plain block and more": {"hidden_size": 256 + 64 * 5, "head_dim": 96},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    save_model(folder, "Qwen3", {"head_dim": 32, "tie_word_embeddings": True})
    return folder


def logits_of(folder: Path, tokens: list[int]) -> torch.Tensor:
    model = load_target(folder, CPU, FLOAT)
    return model.forward(tokens, model.new_cache(len(tokens)))


def assert_same_function(grown: Path, small: Path, tokens: list[int], tolerance: float) -> None:
    expected, actual = logits_of(small, tokens), logits_of(grown, tokens)
    known = expected.shape[1]
    torch.testing.assert_close(actual[:, :known], expected, atol=tolerance, rtol=0)
    assert torch.isfinite(actual).all()
    assert (actual[:, known:].amax(1) < expected.amin(1) - 50).all()


@pytest.mark.parametrize("name", TARGETS)
def test_a_grown_model_computes_the_small_ones_function(name: str, source: Path, tmp_path: Path) -> None:
    growing.grow(source, {**SMALL, **TARGETS[name]}, tmp_path / "grown", dtype=FLOAT)
    tokens = torch.randint(3, 96, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    assert_same_function(tmp_path / "grown", source, tokens, 1e-4)


def test_transformers_reads_it_and_agrees(source: Path, tmp_path: Path) -> None:
    growing.grow(source, {**SMALL, **TARGETS["larger groups, untied"]}, tmp_path / "grown", dtype=FLOAT)
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=FLOAT) for folder in (source, tmp_path / "grown")]
    prompt = torch.tensor([clear_prompt(models[0], random_prompts(4), 24)])
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": 24}
    texts = [model.generate(prompt, eos_token_id=None, **options) for model in models]
    assert texts[0].tolist() == texts[1].tolist()


def test_what_is_multiplied_away_is_random(source: Path, tmp_path: Path) -> None:
    """Of a layer that the small model does not have, only values and up products hold zeros: what reads the stream."""
    growing.grow(source, SMALL, tmp_path / "grown", dtype=FLOAT)
    tensors = TensorFiles(tmp_path / "grown")
    shares = {
        name: float((tensors.load(f"model.layers.5.{name}.weight") == 0).float().mean())
        for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    }
    assert shares["self_attn.v_proj"] == shares["mlp.up_proj"] == pytest.approx(64 / 320)
    assert shares["self_attn.q_proj"] == shares["self_attn.o_proj"] == shares["mlp.down_proj"] == 0


def test_it_is_seeded(source: Path, tmp_path: Path) -> None:
    for number, seed in enumerate((0, 0, 1)):
        growing.grow(source, SMALL, tmp_path / str(number), seed=seed)
    first, same, other = (TensorFiles(tmp_path / str(number)) for number in range(3))
    name = "model.layers.5.mlp.down_proj.weight"
    assert torch.equal(first.load(name), same.load(name))
    assert not torch.equal(first.load(name), other.load(name))


def test_it_is_written_in_shards(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "SHARD_BYTES", 1_000_000)
    growing.grow(source, SMALL, tmp_path / "grown")
    index = json.loads((tmp_path / "grown" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert set(index["weight_map"]) == set(TensorFiles(tmp_path / "grown").names())


@pytest.mark.skipif(not (growing.DEMO / "model.safetensors").exists(), reason="the demo model is not in this checkout")
def test_the_demo_model_at_the_heads_and_width_of_qwen3(tmp_path: Path) -> None:
    growing.grow(growing.DEMO, QWEN3_HALF_B, tmp_path / "grown")
    assert_same_function(tmp_path / "grown", growing.DEMO, list(range(100, 164)), 1e-4)
    assert (tmp_path / "grown" / "tokenizer.json").exists()
    small, large = (load_target(folder, CPU, FLOAT) for folder in (growing.DEMO, tmp_path / "grown"))
    model = AutoModelForCausalLM.from_pretrained(growing.DEMO, dtype=FLOAT)
    prompt = clear_prompt(model, ([300 + n, 301 + n, 302 + n] for n in range(100)), 32)
    assert greedy(small, prompt, 32) == greedy(large, prompt, 32)


def greedy(model: Any, tokens: list[int], count: int) -> list[int]:
    cache = model.new_cache(len(tokens) + count)
    text, pending = [], tokens
    for _ in range(count):
        pending = [int(model.forward(pending, cache, last_only=True).argmax())]
        text += pending
    return text


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden_size": 192}, "must be at least 4 times 64"),
        ({"head_dim": 48}, "head size 48 is not a multiple of 32"),
        ({"num_attention_heads": 4, "num_key_value_heads": 4}, "fewer query heads"),
        ({"num_hidden_layers": 3}, "num_layers is 3"),
        ({"vocab_size": 64}, "vocab_size is 64"),
    ],
)
def test_a_shape_that_cannot_hold_the_function_is_refused(
    change: dict[str, Any], sentence: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=sentence):
        growing.grow(source, {**SMALL, **change}, tmp_path / "grown")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["llama3-8b", "openpangu-7b"])
def test_shapes_without_head_norms_are_refused(name: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no norms of queries and keys"):
        growing.grow(source, SHAPES[name], tmp_path / "grown")


def test_an_existing_folder_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists"):
        growing.grow(source, SMALL, tmp_path)


def test_an_unknown_shape_is_refused_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["grow", "--like", "gpt-2", str(tmp_path / "grown")])
    with pytest.raises(SystemExit) as ended:
        growing.main()
    assert ended.value.code == 2
    assert "--like must be one of qwen3-32b" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("qwen3-8b", 8.19),
        ("qwen3-4b", 4.02),
        ("qwen3-1.7b", 1.72),
        ("qwen3-0.6b", 0.596),
        ("llama3-8b", 8.03),
        ("openpangu-7b", 8.03),  # 6.8 without embedding and head
    ],
)
def test_shapes_have_the_published_sizes(name: str, billions: float) -> None:
    config = DecoderConfig.parse(shape_named("--shape", name))
    attention = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_size
    layer = config.hidden_size * (attention + 3 * config.intermediate_size)
    tables = config.vocab_size * config.hidden_size * (1 if config.tied else 2)
    assert (config.num_layers * layer + tables) / 1e9 == pytest.approx(billions, rel=0.02)
