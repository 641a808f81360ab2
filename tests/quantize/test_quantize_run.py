"""The whole of quantizing on a tiny model: what is written and reported, and that it runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.near_ties import assert_same_but_for_ties
from helpers.quantize_cases import CONFIG, quantize, save_model, tensors_of
from transformers import AutoModelForCausalLM

from quasar_core.api import decoding
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.config import GenerationConfig
from quasar_core.models.hf.causal_lm import TransformersLM, attach_verifier, load_target, load_verifier_alone
from quasar_core.store import current_pair, fingerprint

pytest_plugins = ["helpers.quantize_fixtures"]
CPU = torch.device("cpu")
LAYERS = [
    f"model.layers.{block}.{layer}"
    for block in (0, 1)
    for layer in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
]
IDS = list(range(40, 60))


def logits(model: TransformersLM) -> torch.Tensor:
    return model.forward(IDS, model.new_cache(64))


def dequantized_logits(source: Path, checkpoint: VerifierCheckpoint) -> torch.Tensor:
    """What a plain transformers model says whose weights are the ones that the codes stand for."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    if "lm_head" in checkpoint.layer_names:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # no longer the embedding's
    for name in checkpoint.layer_names:
        model.get_submodule(name).weight.data = checkpoint.layer(name).dequantize()
    with torch.no_grad():
        return model.eval()(torch.tensor([IDS])).logits[0]


def test_what_is_written(source: Path) -> None:
    report = quantize(source)
    output = source.parent / "tiny-gptq-4bit-g32"
    assert report.checkpoint == str(output)
    assert sorted(path.name for path in source.parent.iterdir()) == ["home", "tiny", "tiny-gptq-4bit-g32"]
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "quantize_config.json",
        "quasar.json",
        "successors.tensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    before, after = tensors_of(source), tensors_of(output)
    packed = {f"{layer}.{suffix}" for layer in LAYERS for suffix in ("qweight", "qzeros", "scales", "g_idx")}
    kept = before.keys() - {f"{layer}.weight" for layer in LAYERS}
    assert after.keys() == packed | kept
    for name in kept:
        assert after[name].dtype == before[name].dtype == torch.bfloat16
        assert torch.equal(after[name], before[name])
    assert after["model.layers.0.mlp.up_proj.qzeros"].tolist() == [[0x77777777] * 8] * 2, "zero 8 is stored as 7"
    assert after["model.layers.0.mlp.up_proj.g_idx"].tolist() == [0] * 32 + [1] * 32


def test_the_configs_and_the_card(source: Path) -> None:
    report = quantize(source)
    output = Path(report.checkpoint)
    config = json.loads((output / "config.json").read_text())
    section = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert section == json.loads((output / "quantize_config.json").read_text())
    expected = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "true_sequential": True,
        "damp_percent": 0.05,
    }
    assert section.items() >= expected.items()
    card = json.loads((output / "quasar.json").read_text())
    assert card["format_version"] == 1
    assert card["target"] == {"name": "tiny", "fingerprint": fingerprint(source)}
    assert card["calibration"]["name"] == "self"
    assert card["calibration"]["tokens"] == 6 * 24
    stages = {"calibration text", "quantizing", "successors", "writing", "fidelity", "total"}
    assert card["report"]["seconds"].keys() == stages
    readme = (output / "README.md").read_text()
    assert "quasar quantize tiny --bits 4 --group-size 32 --calibration self --samples 6 --seq-len 24" in readme
    assert f"{report.fidelity.agreement:.4f}" in readme
    for text in (readme, (output / "quasar.json").read_text()):
        assert str(source.parent) not in text, "no folder of this machine"


def test_the_report(source: Path) -> None:
    """A 64 × 64 layer at 4 bits in groups of 32 holds 4 + 16/32 + 4/32 bits a weight, and 32/64 for g_idx."""
    report = quantize(source)
    assert list(report.layer_errors) == LAYERS
    assert all(0 < error < 0.1 for error in report.layer_errors.values())
    layers = [VerifierCheckpoint(Path(report.checkpoint)).layer(name) for name in LAYERS]
    weights = sum(layer.codes.numel() for layer in layers)
    bits = sum(layer.codes.numel() * (4 + 16 / 32 + 4 / 32) + 32 * layer.in_features for layer in layers)
    assert report.bits_per_weight == pytest.approx(bits / weights, abs=1e-3)
    assert report.bytes_before == (source / "model.safetensors").stat().st_size
    assert report.bytes_after == (Path(report.checkpoint) / "model.safetensors").stat().st_size
    assert report.config["seq_len"] == 24
    assert report.seconds["total"] == pytest.approx(sum(report.seconds.values()) / 2, abs=2e-3)
    fidelity = report.fidelity
    assert fidelity.tokens == 3 * 23
    assert 0.5 < fidelity.agreement_sampled <= 1
    assert 0 < fidelity.kl_mean < fidelity.kl_p99
    assert sum(fidelity.margins.counts) == 3 * (40 - 32)
    assert sum(fidelity.margins.agreed) / 24 == fidelity.agreement_beside
    card = (Path(report.checkpoint) / "README.md").read_text()
    assert (
        f"| the same beside the target, as `exact` decodes | {fidelity.agreement_beside:.4f} |\n| agreement on" in card
    )
    stored = VerifierCheckpoint(Path(report.checkpoint))
    assert stored.fidelity == fidelity
    assert stored.target_fingerprint == fingerprint(source)


def test_it_becomes_the_current_pair_and_generates(source: Path) -> None:
    quantize(source)
    assert current_pair().verifier == str(source.parent / "tiny-gptq-4bit-g32")
    pair = decoding.load_pair(device="cpu", dtype="float32", verify="exact")
    result = decoding.Generator(pair, GenerationConfig(max_new_tokens=12, ignore_eos=True)).generate(IDS)
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = torch.tensor([IDS])
    expected = plain.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=None
    )
    assert_same_but_for_ties(plain, [*IDS, *result.token_ids], expected[0].tolist())


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 2, "group_size": 64},
        {"bits": 3, "sym": False},
        {"bits": 8, "group_size": -1, "act_order": False},
        {"group_size": 128, "sym": False},
    ],
    ids=str,
)
def test_other_formats_run_too(source: Path, changes: dict[str, Any]) -> None:
    report = quantize(source, replace(CONFIG, **changes))
    checkpoint = VerifierCheckpoint(Path(report.checkpoint))
    verifier = attach_verifier(load_target(source, CPU, torch.float32), checkpoint, "dense")
    assert torch.allclose(logits(verifier), dequantized_logits(source, checkpoint), atol=1e-3)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.usefixtures("small_texts")
def test_a_quantized_head(bits: int, tied: bool, tmp_path: Path) -> None:
    """It stands on its own, the embedding stays, and both ways to load the verifier run it."""
    source = save_model(tmp_path / "tiny", tied)
    report = quantize(source, replace(CONFIG, lm_head_bits=bits))
    assert list(report.layer_errors) == [*LAYERS, "lm_head"]
    checkpoint = VerifierCheckpoint(Path(report.checkpoint))
    assert checkpoint.layer("lm_head").bits == bits
    assert checkpoint.config["tie_word_embeddings"] is False
    assert checkpoint.config["quantization_config"]["lm_head"] is True
    dynamic = checkpoint.config["quantization_config"].get("dynamic")
    assert dynamic == ({"lm_head$": {"bits": 8, "group_size": 32}} if bits == 8 else None)
    stored = tensors_of(Path(report.checkpoint))
    assert "lm_head.weight" not in stored
    assert torch.equal(stored["model.embed_tokens.weight"], tensors_of(source)["model.embed_tokens.weight"])
    expected = dequantized_logits(source, checkpoint)
    target = load_target(source, CPU, torch.float32)
    own = logits(target)
    assert torch.allclose(logits(attach_verifier(target, checkpoint, "dense")), expected, atol=1e-3)
    assert torch.equal(logits(target), own), "the target is not touched"
    assert torch.allclose(logits(load_verifier_alone(checkpoint, CPU, torch.float32, "dense")), expected, atol=1e-3)
