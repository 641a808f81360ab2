"""Asymmetric calibration: the corrected weight by hand, and blocks that come closer to the full-precision model's."""

import copy
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import random_model
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

from quasar_core.quantize.blocks.activations import capture_first_inputs
from quasar_core.quantize.blocks.collect import find_stream_layers, reach, trace_block
from quasar_core.quantize.blocks.layerwise import quantize_blocks
from quasar_core.quantize.blocks.streaming import find_blocks
from quasar_core.quantize.solve import hessian
from quasar_core.quantize.solve.factor import inverse_factor
from quasar_core.quantize.solve.gptq import SolverConfig
from quasar_core.quantize.solve.hessian import HessianAccumulator, error_correlation, wanted_outputs

SAMPLES = torch.randint(97, (24, 32), generator=torch.Generator().manual_seed(3))


def corrected_weight(
    weight: torch.Tensor, inputs: torch.Tensor, wanted: torch.Tensor, stream: torch.Tensor | None, lone: bool = True
) -> torch.Tensor:
    """W* [out, in], as a run makes it: errors batch by batch, brackets, factor. Another layer may share the inputs."""
    accumulator = HessianAccumulator(inputs.shape[1], inputs.device)
    for begin in range(0, len(inputs), 16):
        part = slice(begin, begin + 16)
        errors = wanted[part] - inputs[part]
        if lone:
            errors = wanted_outputs(wanted[part] @ weight.t(), None if stream is None else stream[part])
        accumulator.add(inputs[part], errors)
    if lone:
        accumulator.subtract_outputs(weight)
    hessian, errors = accumulator.finish("x"), accumulator.errors()
    assert errors is not None
    lacking = error_correlation({"x": weight} if lone else {"x": weight, "y": weight[:3]}, errors)["x"]
    factor = inverse_factor(hessian, torch.arange(len(hessian)), 1e-7, "x")
    return weight + factor.apply_(lacking.t().contiguous()).t()


@pytest.mark.parametrize("lone", [True, False], ids=["a lone layer", "layers that share inputs"])
def test_the_corrected_weight_gives_the_wanted_outputs(lone: bool) -> None:
    """x = M x̄: W* = W M⁻¹ makes of x what W makes of x̄."""
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(64, 8, generator=generator)
    mixing = torch.eye(8) + 0.3 * torch.randn(8, 8, generator=generator)
    inputs, weight = wanted @ mixing.t(), torch.randn(5, 8, generator=generator)
    corrected = corrected_weight(weight, inputs, wanted, None, lone)
    torch.testing.assert_close(inputs @ corrected.t(), wanted @ weight.t(), rtol=1e-3, atol=1e-3)


def test_half_of_the_streams_error_is_made_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs are right, the stream lacks A x: W* = W + ½ A."""
    generator = torch.Generator().manual_seed(1)
    inputs, weight = torch.randn(64, 8, generator=generator), torch.randn(5, 8, generator=generator)
    lacking = torch.randn(5, 8, generator=generator)
    corrected = corrected_weight(weight, inputs, inputs, inputs @ lacking.t())
    torch.testing.assert_close(corrected, weight + 0.5 * lacking, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(hessian, "STREAM_SHARE", 1.0)
    whole = corrected_weight(weight, inputs, inputs, inputs @ lacking.t())
    torch.testing.assert_close(whole, weight + lacking, rtol=1e-3, atol=1e-3)


def test_brackets_in_pieces_of_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """W D for weights of 16 bits, their outputs a few at a time."""
    generator = torch.Generator().manual_seed(2)
    drift = torch.randn(4, 4, generator=generator)
    weights = {name: torch.randn(rows, 4, generator=generator).bfloat16() for name, rows in (("q", 5), ("k", 3))}
    monkeypatch.setattr(hessian, "PIECE", 2)
    for name, lacking in error_correlation(weights, drift).items():
        torch.testing.assert_close(lacking, weights[name].float() @ drift)


@pytest.mark.parametrize("pieces", [2, 512])
def test_outputs_are_subtracted_as_though_token_by_token(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Σ (y − W x) xᵀ of weights in bfloat16; H is what it is without."""
    monkeypatch.setattr(hessian, "PIECE", pieces)
    generator = torch.Generator().manual_seed(4)
    inputs, outputs = torch.randn(300, 150, generator=generator), torch.randn(300, 5, generator=generator)
    weight = torch.randn(5, 150, generator=generator).bfloat16()
    sums, alone = HessianAccumulator(150, inputs.device), HessianAccumulator(150, inputs.device)
    sums.add(inputs, outputs)
    alone.add(inputs)
    sums.subtract_outputs(weight)
    exact = (outputs.double() - inputs.double() @ weight.double().t()).t() @ inputs.double() * 2 / 300
    found = sums.errors()
    assert found is not None
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-3)
    assert torch.equal(sums.finish("x"), alone.finish("x"))


def test_without_a_reference_there_are_no_errors() -> None:
    accumulator = HessianAccumulator(4, torch.device("cpu"))
    accumulator.add(torch.ones(3, 4))
    assert accumulator.errors() is None


@torch.inference_mode()
def test_the_stream_in_front_of_a_layer() -> None:
    """What enters the block, and what attention has added: together with the MLP's output they leave it."""
    model = random_model("llama").model
    activations = capture_first_inputs(model, SAMPLES)
    block = find_blocks(model)[1][0]
    stream = find_stream_layers(trace_block(block, activations))
    assert stream == ["self_attn.o_proj", "mlp.down_proj"]
    batch = activations.first_row()
    entered = reach(block, "self_attn.o_proj", [], batch)[1]
    assert torch.equal(entered, batch.hidden)
    inputs, standing = reach(block, "mlp.down_proj", stream[:1], batch)
    activations.advance(block)
    torch.testing.assert_close(standing + block.mlp.down_proj(inputs), activations.first_row().hidden)
    assert reach(block, "self_attn.q_proj", None, batch)[1] is None


@torch.inference_mode()
def test_a_block_with_norms_behind_its_layers_has_no_such_stream() -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    model = Gemma3ForCausalLM(config).eval()
    activations = capture_first_inputs(model, SAMPLES)
    block = find_blocks(model)[1][0]
    assert find_stream_layers(trace_block(block, activations)) == []


@torch.no_grad()
def distance(model: PreTrainedModel, commits: Path, reference: bool) -> float:
    """How far a quantized model's last hidden states are from the model's."""
    commits.mkdir()
    activations = capture_first_inputs(model, SAMPLES)
    if reference:
        activations.keep_reference()
    quantized = copy.deepcopy(model)
    for block in quantize_blocks(model, activations, SolverConfig(bits=2, group_size=32), commits):
        for name, weight in block.weights.items():
            quantized.get_submodule(name).weight.data = weight.dequantize()
    wanted, got = (each.base_model(input_ids=SAMPLES).last_hidden_state for each in (model, quantized))
    return (wanted - got).norm().item()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_blocks_come_closer_to_the_full_precision_model(name: str, tmp_path: Path) -> None:
    """Random models have 0.75 to 0.85 of the error left."""
    model = random_model(name).model
    assert distance(model, tmp_path / "with", True) < 0.97 * distance(model, tmp_path / "without", False)


def test_a_resumed_run_gives_the_same_codes(tmp_path: Path) -> None:
    """A block that is read from its commit still moves the reference on."""
    model = random_model("llama").model

    def run(commits: Path) -> dict[str, torch.Tensor]:
        activations = capture_first_inputs(model, SAMPLES)
        activations.keep_reference()
        blocks = quantize_blocks(model, activations, SolverConfig(group_size=32), commits)
        return {name: weight.codes for block in blocks for name, weight in block.weights.items()}

    whole = run(tmp_path)
    (tmp_path / "block-00001.safetensors").unlink()
    again = run(tmp_path)
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
