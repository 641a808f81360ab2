"""Block after block: every Hessian against a direct computation on a model whose earlier layers are quantized."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import random_model
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from quasar_core.errors import QuasarError
from quasar_core.quantize.blocks import activations
from quasar_core.quantize.blocks.activations import capture_first_inputs
from quasar_core.quantize.blocks.layerwise import quantize_blocks, quantize_head
from quasar_core.quantize.blocks.streaming import find_blocks, quantized_layers
from quasar_core.quantize.commits import QuantizedBlock, read_commit, write_commit
from quasar_core.quantize.layer_plan import LayerPlan
from quasar_core.quantize.solve import gptq
from quasar_core.quantize.solve.gptq import Solution, SolverConfig, solve, solve_layer

CONFIG = SolverConfig(bits=2, group_size=32)
SAMPLES = torch.randint(97, (5, 24), generator=torch.Generator().manual_seed(3))
IN_ORDER = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]
MIXED: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "layer_types": ["full_attention", "sliding_attention"],
    "sliding_window": 5,
    "initializer_range": 0.3,
}


def make_model(name: str) -> PreTrainedModel:
    """A tiny random model; the last two have another mask, or other rotary tables too, in their second block."""
    torch.manual_seed(0)
    if name == "qwen2-mixed":
        return Qwen2ForCausalLM(Qwen2Config(**MIXED, use_sliding_window=True)).eval()
    if name == "gemma3":
        return Gemma3ForCausalLM(Gemma3TextConfig(**MIXED, head_dim=16)).eval()
    return random_model(name).model


def watch_solver(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.Tensor, Solution]]:
    """What the solver was given and what it found, in order."""
    calls: list[tuple[str, torch.Tensor, Solution]] = []

    def watched(weight: torch.Tensor, hessian: torch.Tensor, *others: Any) -> Solution:
        solution = solve_layer(weight, hessian, *others)
        calls.append((others[-1], hessian, solution))
        return solution

    monkeypatch.setattr(gptq, "solve_layer", watched)
    return calls


@torch.no_grad()
def direct_hessian(model: PreTrainedModel, name: str) -> torch.Tensor:
    """(2 ÷ n) (Σ x xᵀ + Σ |x|² ÷ n · I) over the inputs x of one layer when the whole model reads the samples."""
    inputs: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model(input_ids=SAMPLES, use_cache=False)
    handle.remove()
    rows = inputs[0].flatten(0, -2).double()
    return 2 / len(rows) * (rows.t() @ rows + rows.square().sum() / len(rows) * torch.eye(rows.shape[1]))


@pytest.mark.parametrize("name", ["llama", "mistral", "mistral-sliding", "qwen2", "qwen3", "qwen2-mixed", "gemma3"])
def test_every_hessian_comes_from_inputs_through_the_layers_quantized_before(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(activations, "BATCH_TOKENS", 48)  # batches of two rows, and of one
    calls = watch_solver(monkeypatch)
    model = make_model(name)
    entered = capture_first_inputs(model, SAMPLES)
    assert [len(batch.hidden) for batch in entered.batches()] == [2, 2, 1]
    list(quantize_blocks(model, entered, CONFIG, tmp_path))
    assert [call[0] for call in calls] == [f"model.layers.{i}.{layer}" for i in (0, 1) for layer in IN_ORDER]
    own = copy.deepcopy(model)
    for layer, hessian, solution in calls:
        direct = direct_hessian(own, layer)
        assert torch.allclose(hessian.double(), direct, rtol=1e-3, atol=1e-4 * direct.abs().max().item()), layer
        own.get_submodule(layer).weight.data = solution.weight.dequantize()
    with torch.no_grad():
        last = own.model(input_ids=SAMPLES, use_cache=False).last_hidden_state
        assert torch.allclose(own.model.norm(entered.hidden), last, atol=1e-4)


def test_layers_that_read_the_same_input_share_one_hessian(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = watch_solver(monkeypatch)
    model = make_model("qwen3")
    list(quantize_blocks(model, capture_first_inputs(model, SAMPLES), CONFIG, tmp_path))
    q, k, v, o, gate, up, down = (call[1] for call in calls[:7])
    assert q is k
    assert k is v
    assert gate is up
    assert len({id(hessian) for hessian in (q, o, gate, down)}) == 4


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = make_model("qwen2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    list(quantize_blocks(model, capture_first_inputs(model, SAMPLES), CONFIG, tmp_path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


def test_finished_blocks_are_read_from_their_commits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run that ended after the first block goes on with the second, to the same codes."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "begun").mkdir()
    model = make_model("mistral")
    whole = list(quantize_blocks(model, capture_first_inputs(model, SAMPLES), CONFIG, tmp_path / "whole"))
    begun = quantize_blocks(model, capture_first_inputs(model, SAMPLES), CONFIG, tmp_path / "begun")
    next(begun)
    begun.close()
    calls = watch_solver(monkeypatch)
    seen: list[tuple[str, int, int]] = []
    rest = list(
        quantize_blocks(
            model,
            capture_first_inputs(model, SAMPLES),
            CONFIG,
            tmp_path / "begun",
            progress=lambda *call: seen.append(call),
        )
    )
    assert [call[0] for call in calls] == [f"model.layers.1.{layer}" for layer in IN_ORDER]
    assert seen == [("quantizing", done, 2) for done in (0, 1, 2)]
    for one, other in zip(whole, rest, strict=True):
        assert one.losses == pytest.approx(other.losses)
        for name, weight in one.weights.items():
            for key, tensor in weight.pack().items():
                assert torch.equal(tensor, other.weights[name].pack()[key]), f"{name}.{key}"


def test_a_commit_is_read_as_it_was_written(tmp_path: Path) -> None:
    weight = solve(torch.randn(32, 32), torch.eye(32), CONFIG).weight
    write_commit(tmp_path / "block", QuantizedBlock({"a.b": weight}, {"a.b": 0.1}))
    again = read_commit(tmp_path / "block")
    assert again.losses == {"a.b": 0.1}
    assert torch.equal(again.weights["a.b"].dequantize(), weight.dequantize())
    assert [path.name for path in tmp_path.iterdir()] == ["block"]


def test_the_head_is_quantized_on_what_leaves_the_last_norm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**{**MIXED, "vocab_size": 128, "use_sliding_window": True})).eval()
    plan = LayerPlan(CONFIG, {"lm_head": SolverConfig(bits=8, group_size=32)})
    left = capture_first_inputs(model, SAMPLES)
    blocks = list(quantize_blocks(model, left, plan, tmp_path))
    calls = watch_solver(monkeypatch)
    head = quantize_head(model, left, plan, tmp_path)
    own = copy.deepcopy(model)
    for block in blocks:
        for name, weight in block.weights.items():
            own.get_submodule(name).weight.data = weight.dequantize()
    direct = direct_hessian(own, "lm_head")
    assert torch.allclose(calls[0][1].double(), direct, rtol=1e-3, atol=1e-4 * direct.abs().max().item())
    assert head.weights["lm_head"].bits == 8
    quantize_head(model, left, plan, tmp_path)
    assert len(calls) == 1, "the second time it is read from its commit"


def test_what_cannot_be_packed_is_refused_before_any_work() -> None:
    model = make_model("llama")
    plan = LayerPlan(SolverConfig())
    quantized_layers(model, plan)
    with pytest.raises(QuasarError, match="Layer lm_head cannot be packed: 97 outputs are not a multiple of 8"):
        quantized_layers(model, LayerPlan(SolverConfig(), {"lm_head": SolverConfig()}))
    odd = copy.deepcopy(model)
    odd.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 60)
    with pytest.raises(QuasarError, match=r"Layer model\.layers\.1\.mlp\.up_proj cannot be packed: 60 outputs"):
        quantized_layers(odd, plan)


def test_a_model_of_another_build_is_refused_in_one_sentence() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16))
    with pytest.raises(QuasarError, match="--lm-head-bits: GPT2LMHeadModel has no final norm and lm_head"):
        quantized_layers(model, LayerPlan(SolverConfig(), {"lm_head": SolverConfig(8)}))
    model.config.n_layer = 3
    with pytest.raises(QuasarError, match="No list of 3 decoder blocks was found in GPT2LMHeadModel"):
        find_blocks(model)


def test_a_model_without_linear_layers_is_refused() -> None:
    """GPT-2's blocks multiply by transposed weights, which are no linear layers."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16))
    with pytest.raises(QuasarError, match="GPT2LMHeadModel has no linear layers in its blocks"):
        quantized_layers(model, LayerPlan(SolverConfig()))


def test_experts_that_are_not_taken_apart_are_refused() -> None:
    """As they stand in transformers' own model: one tensor for all."""
    model = copy.deepcopy(make_model("qwen3"))
    model.model.layers[1].mlp.gate_up_proj = torch.nn.Parameter(torch.zeros(4, 8, 8))
    with pytest.raises(QuasarError, match=r"model\.layers\.1\.mlp\.gate_up_proj holds experts in a form"):
        quantized_layers(model, LayerPlan(SolverConfig()))
