"""Mixtures of experts: quantized with their routed inputs, written under per-expert names, read by transformers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.moe_models import SIZES, qwen3_moe, save
from helpers.quantize_cases import CONFIG, quantize, tensors_of
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.models.hf.causal_lm import TransformersLM, attach_verifier, load_target, load_verifier_alone
from quasar_core.models.hf.experts import module_name, separate_experts
from quasar_core.quantize.blocks import collect
from quasar_core.quantize.blocks.activations import capture_first_inputs
from quasar_core.quantize.blocks.collect import has_too_few_samples
from quasar_core.quantize.blocks.streaming import linear_layers, open_target
from quasar_core.quantize.layer_plan import LayerPlan
from quasar_core.quantize.solve.eight_bit import E4M3Format, Int8Format
from quasar_core.quantize.solve.gptq import solve

pytest_plugins = ["helpers.quantize_fixtures"]
CPU = torch.device("cpu")
IDS = list(range(40, 60))


def mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


MODELS = {"qwen3-moe": qwen3_moe, "mixtral": mixtral}
NAMES = {
    "qwen3-moe": "model.layers.1.mlp.experts.2.{}.qweight",
    "mixtral": "model.layers.1.block_sparse_moe.experts.2.{}.qweight",
}
PARTS = {"qwen3-moe": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}


def logits(model: TransformersLM) -> torch.Tensor:
    return model.forward(IDS, model.new_cache(64))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("small_texts")
def test_the_verifier_computes_what_its_codes_stand_for(name: str, tmp_path: Path) -> None:
    source = save(tmp_path / "tiny", MODELS[name])
    report = quantize(source)
    checkpoint = VerifierCheckpoint(Path(report.checkpoint))
    stored = tensors_of(Path(report.checkpoint))
    assert {NAMES[name].format(part) for part in PARTS[name]} < stored.keys()
    assert len(checkpoint.layer_names) == 2 * (4 + 4 * 3)
    plain: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    separate_experts(plain)
    for layer in checkpoint.layer_names:
        plain.get_submodule(module_name(layer)).weight.data = checkpoint.layer(layer).dequantize()
    with torch.no_grad():
        expected = plain(torch.tensor([IDS])).logits[0]
    target = load_target(source, CPU, torch.float32)
    own = logits(target)
    assert torch.allclose(logits(attach_verifier(target, checkpoint, "dense")), expected, atol=1e-3)
    assert torch.allclose(logits(load_verifier_alone(checkpoint, CPU, torch.float32, "dense")), expected, atol=1e-3)
    assert torch.equal(logits(target), own), "the target is not touched"
    assert not torch.allclose(own, expected, atol=1e-3)


@pytest.mark.parametrize("method", ["gptq", "w8a8", "fp8"])
@pytest.mark.usefixtures("small_texts")
def test_experts_that_no_text_reached_are_rounded_and_named(method: Any, tmp_path: Path) -> None:
    """A router whose logits are v · x, −v · x, 0 and 0 never sends a token to the last two experts."""

    def one_sided() -> Qwen3MoeForCausalLM:
        sizes = {**SIZES, "num_experts_per_tok": 1}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_experts=4, moe_intermediate_size=32))
        for layer in model.model.layers:
            layer.mlp.gate.weight.data[1:] = -layer.mlp.gate.weight.data[:1]
            layer.mlp.gate.weight.data[2:] = 0
        return model

    source = save(tmp_path / "tiny", one_sided)
    config = CONFIG if method == "gptq" else replace(CONFIG, method=method, bits=8, group_size=-1)
    report = quantize(source, config)
    unread = [f"model.layers.{layer}.mlp.experts.{expert}" for layer in (0, 1) for expert in (2, 3)]
    parts = PARTS["qwen3-moe"]
    assert sorted(report.rounded_layers) == sorted(f"{name}.{part}" for name in unread for part in parts)
    checkpoint, weights = VerifierCheckpoint(Path(report.checkpoint)), open_target(source, CPU, torch.float32).whole()

    def rounded(name: str) -> torch.Tensor:
        weight = weights.get_submodule(name).weight
        if method != "gptq":
            return (Int8Format() if method == "w8a8" else E4M3Format()).round_weight(weight).dequantize()
        return solve(weight, torch.eye(weight.shape[1]), LayerPlan.of(CONFIG).solver(name)).weight.dequantize()

    assert torch.equal(checkpoint.layer(f"{unread[3]}.down_proj").dequantize(), rounded(f"{unread[3]}.down_proj"))
    read = "model.layers.1.mlp.experts.0.gate_proj"
    assert not torch.equal(checkpoint.layer(read).dequantize(), rounded(read))


@pytest.mark.parametrize("rows", [1, 2])
def test_less_than_a_row_for_128_inputs_is_too_little(rows: int) -> None:
    layer = torch.nn.Linear(256, 8)
    assert has_too_few_samples("mlp.experts.3.up_proj", layer, rows) == (rows == 1)
    assert not has_too_few_samples("mlp.up_proj", layer, rows)


@pytest.mark.usefixtures("small_texts")
def test_experts_that_read_too_little_are_rounded_and_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And so is every expert, where a row is asked for each thousandth of an input."""
    monkeypatch.setattr(collect, "MOST_INPUTS_PER_ROW", 1e-3)
    report = quantize(save(tmp_path / "tiny", MODELS["qwen3-moe"]), CONFIG)
    assert sorted(report.rounded_layers) == sorted(name for name in report.layer_errors if ".experts." in name)


@pytest.mark.parametrize(("method", "error", "bound"), [("w8a8", 2e-4, 0.2), ("fp8", 2e-3, 0.4)])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("small_texts")
def test_eight_bits_for_weights_and_activations(
    name: str, method: Any, error: float, bound: float, tmp_path: Path
) -> None:
    """Nothing is smoothed, each expert is solved with the rows that reach it; both ways of loading compute the same.

    The logits' bounds are wide, since a little error sends some tokens to other experts.
    """
    source = save(tmp_path / "tiny", MODELS[name])
    report = quantize(source, replace(CONFIG, method=method, bits=8, group_size=-1))
    checkpoint, stored = VerifierCheckpoint(Path(report.checkpoint)), tensors_of(Path(report.checkpoint))
    marker = "weight_scale"
    assert "not smoothed, " in (checkpoint.folder / "README.md").read_text()
    assert {NAMES[name].replace("qweight", marker).format(part) for part in PARTS[name]} < stored.keys()
    assert len(checkpoint.layer_names) == 2 * (4 + 4 * 3)
    assert max(report.layer_errors.values()) < error
    target = load_target(source, CPU, torch.float32)
    own, expected = logits(target), logits(load_verifier_alone(checkpoint, CPU, torch.float32, "dense"))
    assert torch.allclose(logits(attach_verifier(target, checkpoint, "dense")), expected, atol=1e-4)
    assert 0 < (expected - own).norm() < bound * own.norm()
    kernel = "int8" if method == "w8a8" else "float8"
    rounded = logits(load_verifier_alone(checkpoint, CPU, torch.float32, kernel))
    assert 0 < (rounded - own).norm() < 2 * bound * own.norm()


def test_experts_are_watched_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fewer Hessians in memory change no Hessian."""
    source = save(tmp_path / "tiny", qwen3_moe)
    target = open_target(source, CPU, torch.float32)
    samples = torch.randint(264, (4, 32), generator=torch.Generator().manual_seed(0))

    def hessians() -> tuple[int, dict[str, torch.Tensor]]:
        with torch.inference_mode():
            activations, block = capture_first_inputs(target.ends(), samples), target.block(0)
            layers = linear_layers(block)
            found = collect.find_stages(collect.trace_block(block, activations))
            sums = {}
            for stage in found:
                inputs = collect.collect_inputs(block, stage, layers, activations)
                sums |= {name: accumulator.sum for name, accumulator in inputs.items()}
            return len(found), sums

    count, together = hessians()
    monkeypatch.setattr(collect, "HESSIAN_BYTES", 4 * 64**2)
    more, apart = hessians()
    assert (count, more) == (4, 2 + 4 + 1)
    assert together.keys() == apart.keys()
    for name, hessian in together.items():
        torch.testing.assert_close(hessian, apart[name], rtol=1e-4, atol=1e-5 * hessian.abs().max().item())
