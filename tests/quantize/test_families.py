"""What transformers runs is quantized, or refused in one sentence before any work; what is written is loaded again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.decoder_cases import CPU, FLOAT, assert_close, fresh_logits, in_passes, random_tokens
from helpers.default_share import some
from helpers.families import QUANTIZED, RECURRENT, SIZES, gpt2, greedy, make, save_family
from helpers.quantize_cases import CONFIG
from safetensors.torch import load_file, save_file

from quasar_cli.main import run
from quasar_core.api import decoding, quantizing
from quasar_core.checkpoint.loaders import Config
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.config import GenerationConfig
from quasar_core.decode.generator import Generator
from quasar_core.errors import QuasarError
from quasar_core.models.hf.experts import separate_experts
from quasar_core.models.pair import Pair
from quasar_core.models.weights.lean_weights import attach_verifier, load_target

pytest_plugins = ["helpers.quantize_fixtures"]
pytestmark = pytest.mark.usefixtures("small_texts")
IDS = list(range(40, 60))
LENGTH = 24


def load(folder: Path, verify: str, **options: Any) -> Pair:
    return decoding.load_pair(str(folder), verify=verify, device="cpu", dtype="float32", **options)  # type: ignore[arg-type]


def generate(pair: Pair, verify: str, draft: str = "ngram", ids: list[int] = IDS) -> list[int]:
    config = GenerationConfig(LENGTH, verify, draft, num_draft_tokens=3, window=4, ignore_eos=True)  # type: ignore[arg-type]
    return list(Generator(pair, config).generate(ids).token_ids)


# Those whose files, layers or masks are like no other's here.
KINDS = ["falcon, new", "mpt", "bloom", "starcoder", "gptj", "opt", "gemma3, vision", "lfm2, dynamic", "qwen3.5"]
KINDS += ["granite 4, experts", "lfm2 moe"]


@pytest.mark.parametrize("name", some(QUANTIZED, KINDS))
def test_a_family_is_quantized_and_its_verifier_generates_the_targets_own_text(name: str, tmp_path: Path) -> None:
    expected = greedy(save_family(tmp_path / "m", QUANTIZED[name]), IDS, LENGTH)
    quantizing.estimate(str(tmp_path / "m"), CONFIG, device="cpu")
    report = quantizing.quantize(str(tmp_path / "m"), CONFIG, device="cpu")
    stored = load_file(Path(report.checkpoint) / "model.safetensors")
    assert len([name for name in stored if name.endswith(".qweight")]) == len(report.layer_errors) > 0
    pair = load(tmp_path / "m", "exact")
    assert generate(pair, "exact") == expected
    assert generate(pair, "full") == expected
    alone = load(tmp_path / "m", "quantized", use_target=False)
    assert len(generate(alone, "quantized")) == LENGTH


def test_how_fast_states_fade_keeps_the_targets_precision_and_loaders_are_told(tmp_path: Path) -> None:
    save_family(tmp_path / "m", QUANTIZED["qwen3.5"])
    checkpoint = Path(quantizing.quantize(str(tmp_path / "m"), CONFIG, device="cpu").checkpoint)
    stored = load_file(checkpoint / "model.safetensors")
    own = load_file(tmp_path / "m" / "model.safetensors")
    for name in ("in_proj_a", "in_proj_b"):
        weight = f"model.layers.0.linear_attn.{name}.weight"
        assert torch.equal(stored[weight], own[weight])
    assert "model.layers.0.linear_attn.in_proj_qkv.qweight" in stored
    section = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    assert Config.of(section).width("model.layers.0.linear_attn.in_proj_a") is None
    assert Config.of(section).width("model.layers.0.linear_attn.in_proj_ba") is None
    assert Config.of(section).width("model.layers.0.linear_attn.in_proj_qkv") == Config.of(section).usual
    [listed] = section["modules_in_block_to_quantize"]  # for optimum, which asks no rules
    assert {f"{name}.qweight" for name in listed} == {name for name in stored if name.endswith(".qweight")}


def test_the_gate_of_a_shared_expert_keeps_the_targets_precision_and_loaders_are_told(tmp_path: Path) -> None:
    """It has one row, and codes come in eights."""
    save_family(tmp_path / "m", QUANTIZED["qwen3.5 moe"])
    checkpoint = Path(quantizing.quantize(str(tmp_path / "m"), CONFIG, device="cpu").checkpoint)
    stored = load_file(checkpoint / "model.safetensors")
    own = load_file(tmp_path / "m" / "model.safetensors")
    gate, shared = "model.layers.0.mlp.shared_expert_gate", "model.layers.0.mlp.shared_expert.up_proj"
    assert torch.equal(stored[f"{gate}.weight"], own[f"{gate}.weight"])
    assert f"{shared}.qweight" in stored
    section = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    assert Config.of(section).width(gate) is None
    assert "modules_in_block_to_quantize" not in section
    assert Config.of(section).width(shared) == Config.of(section).usual


MIXED = {
    "lfm2 moe": ["feed_forward.experts.3.w1", "feed_forward.experts.3.w3", "feed_forward.experts.3.w2"],
    "granite 4, experts": ["block_sparse_moe.experts.3.gate_proj", "shared_mlp.input_linear", "mamba.in_proj"],
    "granite moe shared": ["block_sparse_moe.experts.3.down_proj", "shared_mlp.output_linear"],
}


@pytest.mark.parametrize("name", MIXED)
def test_experts_of_hybrids_and_what_is_shared_stand_in_codes_under_the_files_names(name: str, tmp_path: Path) -> None:
    """And the decoder's verifier is transformers' model of the weights that the codes stand for."""
    model = save_family(tmp_path / "m", QUANTIZED[name])
    report = quantizing.quantize(str(tmp_path / "m"), CONFIG, device="cpu")
    checkpoint = VerifierCheckpoint(Path(report.checkpoint))
    index = 1 if name == "lfm2 moe" else 0
    assert {f"model.layers.{index}.{part}" for part in MIXED[name]} < set(checkpoint.layer_names)
    assert not any(".gate." in layer or ".router." in layer for layer in checkpoint.layer_names)
    separate_experts(model)
    for layer in checkpoint.layer_names:
        model.get_submodule(module_of(layer)).weight.data = checkpoint.layer(layer).dequantize()
    target = load_target(tmp_path / "m", CPU, FLOAT)
    tokens = random_tokens(30)
    found = in_passes(attach_verifier(target, checkpoint, "dense"), tokens, [20, 1, 4])
    assert_close(found, fresh_logits(model, tokens))


def module_of(layer: str) -> str:
    """Where transformers' model with separate experts has one."""
    parts = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"} if ".experts." in layer else {}
    before, _, last = layer.rpartition(".")
    return f"{before}.{parts.get(last, last)}"


def llama(**options: Any) -> Any:
    return make("Llama", **{**SIZES, **options})


def rename(folder: Path, change: Any, **metadata: str) -> None:
    """Write the weights again under other names; `None` leaves a tensor out."""
    tensors = load_file(folder / "model.safetensors")
    named = {change(name): tensor for name, tensor in tensors.items() if change(name) is not None}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt", **metadata})


@pytest.mark.parametrize("head_bits", [16, 8])
def test_a_tied_model_whose_matrix_is_stored_as_the_head_alone(head_bits: int, tmp_path: Path) -> None:
    model = save_family(tmp_path / "m", lambda: llama(tie_word_embeddings=True))
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    rename(tmp_path / "m", lambda name: head if name == embedding else name, **{embedding: head})
    expected = greedy(model, IDS, LENGTH)
    config = type(CONFIG)(group_size=32, samples=6, seq_len=24, lm_head_bits=head_bits)
    quantizing.quantize(str(tmp_path / "m"), config, device="cpu")
    pair = load(tmp_path / "m", "exact")
    assert "decoder: our own" in pair.notes
    assert generate(pair, "exact") == expected
    assert len(generate(load(tmp_path / "m", "quantized", use_target=False), "quantized")) == LENGTH


@pytest.mark.parametrize("tied", [False, True])
def test_weights_without_the_base_models_prefix(tied: bool, tmp_path: Path) -> None:
    model = save_family(tmp_path / "m", lambda: llama(tie_word_embeddings=tied))
    rename(tmp_path / "m", lambda name: name.removeprefix("model."))
    expected = greedy(model, IDS, LENGTH)
    report = quantizing.quantize(str(tmp_path / "m"), CONFIG, device="cpu")
    assert "layers.0.mlp.up_proj.qweight" in load_file(Path(report.checkpoint) / "model.safetensors")
    pair = load(tmp_path / "m", "exact")
    reason = "its files hold embed_tokens.weight, which LlamaForCausalLM does not have"
    assert f"decoder: transformers, as {reason}" in pair.notes
    assert generate(pair, "exact") == expected
    assert len(generate(load(tmp_path / "m", "quantized", use_target=False), "quantized")) == LENGTH


@pytest.mark.parametrize("equal", [False, True])
def test_a_head_of_its_own_counts_where_the_config_ties_it(equal: bool, tmp_path: Path) -> None:
    """As in transformers: what is stored and differs from the embedding is used, however the config has it."""
    save_family(tmp_path / "m", lambda: llama(tie_word_embeddings=True))
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone() if equal else embedding.flip(0).contiguous()
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    expected = greedy(theirs, IDS, LENGTH)
    quantizing.quantize(str(tmp_path / "m"), CONFIG, device="cpu")
    pair: Any = load(tmp_path / "m", "exact")
    assert (pair.target.head.weight is pair.target.embedding) == equal
    assert generate(pair, "exact") == expected
    alone: Any = load(tmp_path / "m", "quantized", use_target=False)
    assert torch.equal(alone.verifier.head.weight, tensors["lm_head.weight"])


def test_a_tensor_beside_the_model_is_left_to_transformers_and_said(tmp_path: Path) -> None:
    model = save_family(tmp_path / "m", llama)
    tensors = load_file(tmp_path / "m" / "model.safetensors") | {"lm_head.bias": torch.ones(264)}
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    pair = load(tmp_path / "m", "full")
    assert "decoder: transformers, as its files hold lm_head.bias, which LlamaForCausalLM does not have" in pair.notes
    assert "weights: 1 stored tensors are not of this model, such as lm_head.bias" in pair.notes
    assert generate(pair, "full") == greedy(model, IDS, LENGTH)


def test_buffers_that_older_tools_stored_have_no_effect(tmp_path: Path) -> None:
    save_family(tmp_path / "m", llama)
    stale = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16), "rotary_emb.inv_freq": torch.zeros(16)}
    save_file(load_file(tmp_path / "m" / "model.safetensors") | stale, tmp_path / "m" / "model.safetensors")
    assert "decoder: our own" in load(tmp_path / "m", "full").notes


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_generate_plainly_and_nothing_else(name: str, tmp_path: Path) -> None:
    model = save_family(tmp_path / "m", RECURRENT[name])
    pair = load(tmp_path / "m", "full")
    generator = Generator(pair, GenerationConfig(LENGTH, "full", "none", ignore_eos=True))
    for ids in (IDS, [*IDS, *IDS[:7]], IDS[:5]):  # another prompt begins anew, whatever it shares with the last
        assert list(generator.generate(ids).token_ids) == greedy(model, ids, LENGTH)
    with pytest.raises(QuasarError, match="recurrent layers: it needs --verify full --draft none"):
        generate(pair, "full")
    sentence = r"m has recurrent layers .*whose state cannot be moved back .* with --verify full --draft none\.$"
    for refused in (
        lambda: load(tmp_path / "m", "full", draft="ngram"),
        lambda: load(tmp_path / "m", "exact"),
        lambda: quantizing.estimate(str(tmp_path / "m"), CONFIG, device="cpu"),
        lambda: quantizing.quantize(str(tmp_path / "m"), CONFIG, device="cpu"),
    ):
        with pytest.raises(QuasarError, match=sentence):
            refused()
    assert not list(tmp_path.glob("m-*")), "nothing was begun"


def test_recurrent_layers_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_family(tmp_path / "m", RECURRENT["falcon-h1"])
    command = ["generate", "--model", str(tmp_path / "m"), "--raw", "--prompt", "abcabc", "--max-new-tokens", "8"]
    command += ["--dtype", "float32", "--json", "--verify", "full"]
    assert run([*command, "--draft", "none"]) == 0
    answer = json.loads(capsys.readouterr().out)
    expected = greedy(model, answer["prompt_token_ids"], 8)
    assert answer["token_ids"] == expected[: len(answer["token_ids"])]
    assert run(command) == 1
    assert "cannot be moved back" in capsys.readouterr().err


def test_a_family_without_linear_layers_is_refused_before_any_work(tmp_path: Path) -> None:
    save_family(tmp_path / "m", gpt2)
    for start in (quantizing.estimate, quantizing.quantize):
        with pytest.raises(QuasarError, match="has no linear layers in its blocks"):
            start(str(tmp_path / "m"), CONFIG, device="cpu")
    assert not list(tmp_path.glob("m-*"))
