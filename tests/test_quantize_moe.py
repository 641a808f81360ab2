"""Mixtures of experts: quantized with their routed inputs, written under per-expert names, read by transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantize_cases import CONFIG, quantize, tensors_of
from tiny_model import save_tiny_model
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.models.experts import module_name, separate_experts
from quasar_core.models.transformers_lm import TransformersLM, attach_verifier, load_target, load_verifier_alone
from quasar_core.quantize import layerwise
from quasar_core.quantize.activations import capture_first_inputs
from quasar_core.quantize.blocks import linear_layers
from quasar_core.quantize.gptq import solve
from quasar_core.quantize.layer_plan import LayerPlan
from quasar_core.quantize.streaming import open_target

pytest_plugins = ["quantize_fixtures"]
CPU = torch.device("cpu")
IDS = list(range(40, 60))
SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "num_experts_per_tok": 2,
    "eos_token_id": 0,
    "bos_token_id": None,
}


def qwen3_moe() -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=32, norm_topk_prob=True))


def mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


MODELS = {"qwen3-moe": qwen3_moe, "mixtral": mixtral}
NAMES = {
    "qwen3-moe": "model.layers.1.mlp.experts.2.{}.qweight",
    "mixtral": "model.layers.1.block_sparse_moe.experts.2.{}.qweight",
}
PARTS = {"qwen3-moe": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}


def save(folder: Path, make: Callable[[], Any]) -> Path:
    """The model with a byte-level tokenizer."""
    save_tiny_model(folder)
    torch.manual_seed(1)
    make().to(torch.bfloat16).save_pretrained(folder)
    return folder


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


@pytest.mark.parametrize(("least", "rounded"), [(1e-9, 0), (1e9, 2 * 4 * 3)], ids=["text enough", "too little"])
@pytest.mark.usefixtures("small_texts")
def test_experts_that_saw_too_little_text_are_rounded_and_named(
    least: float, rounded: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerwise, "LEAST_ROWS", least)
    source = save(tmp_path / "tiny", qwen3_moe)
    report = quantize(source)
    assert len(report.rounded_layers) == rounded
    assert all(".experts." in name for name in report.rounded_layers)
    checkpoint, weights = VerifierCheckpoint(Path(report.checkpoint)), open_target(source, CPU, torch.float32).whole()
    name = "model.layers.1.mlp.experts.3.down_proj"
    alone = solve(weights.get_submodule(name).weight, torch.eye(32), LayerPlan.of(CONFIG).solver(name)).weight
    assert torch.equal(checkpoint.layer(name).codes, alone.codes) == (rounded > 0)


def test_experts_are_watched_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fewer Hessians in memory change no Hessian."""
    source = save(tmp_path / "tiny", qwen3_moe)
    target = open_target(source, CPU, torch.float32)
    samples = torch.randint(264, (4, 32), generator=torch.Generator().manual_seed(0))

    def hessians() -> tuple[int, dict[str, torch.Tensor]]:
        with torch.inference_mode():
            activations, block = capture_first_inputs(target.ends(), samples), target.block(0)
            layers = linear_layers(block)
            found = layerwise.stages(block, layers, activations)
            sums = {}
            for stage in found:
                inputs = layerwise.collect_inputs(block, stage, layers, activations)
                sums |= {name: accumulator.sum for name, accumulator in inputs.items()}
            return len(found), sums

    count, together = hessians()
    monkeypatch.setattr(layerwise, "HESSIAN_BYTES", 4 * 64**2)
    more, apart = hessians()
    assert (count, more) == (4, 2 + 4 + 1)
    assert together.keys() == apart.keys()
    assert all(torch.equal(together[name], apart[name]) for name in together)
