"""Codes and values of W8A8 and fp8: GPTQ's against a slow oracle, the paper's own, and what each is worth."""

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.quantize_cases import quantize, save_model, tensors_of
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from quasar_cli.main import run
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.config import QuantizeConfig
from quasar_core.errors import QuasarError, UsageError
from quasar_core.files import read_json
from quasar_core.quantize.blocks.activations import capture_first_inputs
from quasar_core.quantize.blocks.eight_bit import EightBitMethod
from quasar_core.quantize.commits import QuantizedBlock, read_commit, write_commit
from quasar_core.quantize.solve import gptq
from quasar_core.quantize.solve.eight_bit import (
    E4M3Format,
    EightBitFormat,
    Int8Format,
    channel_scales,
    round_columns,
    round_to_nearest,
    solve_eight_bits,
)
from quasar_core.quantize.solve.factor import inverse_factor
from quasar_core.quantize.solve.gptq import SolverConfig, column_order

pytest_plugins = ["helpers.quantize_fixtures"]
CONFIG = SolverConfig(bits=8, group_size=-1)
NUMBERS = [Int8Format(), E4M3Format()]
W8A8: dict[str, Any] = {"method": "w8a8", "bits": 8, "group_size": -1, "samples": 6, "seq_len": 24}


def inputs(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Rows [count, size] whose channels depend on one another and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, size, generator=generator) @ torch.randn(size, size, generator=generator)
    return mixed * torch.rand(size, generator=generator).add(0.1)


def layer(out: int, size: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(out, size, generator=torch.Generator().manual_seed(seed))


def by_hand(number_format: EightBitFormat, weight: torch.Tensor, hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """Values [out, in] in float64: after every column the best continuous rest, given all that is rounded so far."""
    size = len(hessian)
    damped = hessian.double() + damp * hessian.double().diagonal().mean() * torch.eye(size, dtype=torch.double)
    order = torch.argsort(hessian.diagonal(), descending=True)
    scales = channel_scales(weight, number_format.largest).double()[:, None]
    rounded, rest = weight.double().clone(), weight.double().clone()
    for done, column in enumerate(order.tolist()):
        rounded[:, column] = number_format.nearest(rest[:, column : column + 1] / scales)[:, 0] * scales[:, 0]
        fixed, free = order[: done + 1], order[done + 1 :]
        error = weight.double()[:, fixed] - rounded[:, fixed]
        # The rest that minimises e H eᵀ: H_ff (W − R)_f = −H_fc (W − Q)_c
        moved = torch.linalg.solve(damped[free][:, free], damped[free][:, fixed] @ error.t()).t()
        rest[:, free] = weight.double()[:, free] + moved
    return rounded / scales


@pytest.mark.parametrize("number_format", NUMBERS, ids=["integers", "floats"])
@pytest.mark.parametrize("size", [24, 300])
def test_columns_are_rounded_as_the_oracle_rounds_them(number_format: EightBitFormat, size: int) -> None:
    """More columns than a block of the solver has; a tie that float32 decides otherwise moves what follows a little."""
    rows, weight = inputs(4 * size, size), layer(12, size)
    hessian = 2 / len(rows) * rows.t() @ rows
    factor = inverse_factor(hessian, column_order(hessian, True), 0.05, "x")
    scales = channel_scales(weight, number_format.largest)
    found = round_columns(number_format, weight.t().contiguous(), scales, factor).t()
    assert torch.equal(found, number_format.nearest(found))
    assert (found == by_hand(number_format, weight, hessian, 0.05)).double().mean() > 0.9


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    number_format=st.sampled_from(NUMBERS),
    size=st.sampled_from([8, 33, 130]),
    count=st.integers(1, 200),
    seed=st.integers(0, 1000),
    spoilt=st.sampled_from(["nothing", "a dead input", "an output of zeros", "a huge weight"]),
)
def test_no_output_is_worse_than_rounded_to_nearest(
    number_format: EightBitFormat, size: int, count: int, seed: int, spoilt: str
) -> None:
    rows, weight = inputs(count, size, seed), layer(9, size, seed + 1)
    if spoilt == "a dead input":
        rows[:, 3] = 0
    if spoilt == "an output of zeros":
        weight[2] = 0
    if spoilt == "a huge weight":
        weight[4, 5] = 1000
    hessian = 2 / count * rows.t() @ rows
    solved = solve_eight_bits(number_format, {"a": weight}, hessian, {"a": CONFIG})["a"]
    read = weight * (hessian.diagonal() > 0)  # an input that is always 0 takes no part in the scales
    nearest = round_to_nearest(number_format, {"a": read}, hessian)["a"]
    error, of_nearest = (rows @ (s.weight.dequantize() - weight).t() for s in (solved, nearest))
    energy = (rows @ weight.t()).square().sum(dim=0)
    assert (error.square().sum(dim=0) <= of_nearest.square().sum(dim=0) * 1.001 + 1e-9 * energy + 1e-12).all()
    assert solved.loss <= nearest.loss * 1.001 + 1e-9
    assert solved.loss == pytest.approx(error.square().sum().item() / count, rel=0.02, abs=1e-4 * solved.loss + 1e-6)


@pytest.mark.parametrize("number_format", NUMBERS, ids=["integers", "floats"])
def test_other_text_gains_too(number_format: EightBitFormat) -> None:
    """On the mean of five layers."""
    shares = []
    for seed in range(5):
        rows, others = inputs(2000, 64, seed).split(1000)
        weight, hessian = layer(32, 64, seed + 1), 2 / len(rows) * rows.t() @ rows
        solved = solve_eight_bits(number_format, {"a": weight}, hessian, {"a": CONFIG})["a"].weight.dequantize()
        nearest = number_format.round_weight(weight).dequantize()
        errors = [(others @ (rounded - weight).t()).square().sum().item() for rounded in (solved, nearest)]
        shares.append(errors[0] / errors[1])
    assert statistics.mean(shares) < 0.6, shares


@pytest.mark.parametrize("number_format", NUMBERS, ids=["integers", "floats"])
def test_layers_of_a_group_are_solved_apart_and_corrected_where_something_lacks(number_format: EightBitFormat) -> None:
    rows, weights = inputs(400, 32), {"a": layer(8, 32), "b": layer(16, 32, 5)}
    hessian = 2 / len(rows) * rows.t() @ rows
    configs = dict.fromkeys(weights, CONFIG)
    together = solve_eight_bits(number_format, weights, hessian, configs)
    alone = solve_eight_bits(number_format, {"b": weights["b"]}, hessian, configs)
    same = together["b"].weight.dequantize() == alone["b"].weight.dequantize()
    assert same.double().mean() > 0.95, "but for ties"
    assert together["b"].loss == pytest.approx(alone["b"].loss, rel=0.01)
    shift = 0.3 * layer(16, 32, 6)
    correlations = {"b": shift @ hessian}  # then W + shift is what gives the outputs that are wanted
    corrected = solve_eight_bits(number_format, weights, hessian, configs, correlations)["b"].weight.dequantize()
    far, near = ((rows @ (corrected - aim).t()).norm() for aim in (weights["b"], weights["b"] + shift))
    assert near < 0.3 * far
    assert correlations == {}


def test_weights_that_are_not_finite_are_named() -> None:
    weight = layer(4, 16)
    weight[1, 2] = torch.nan
    with pytest.raises(QuasarError, match=r"model\.up could not be quantized"):
        solve_eight_bits(Int8Format(), {"model.up": weight}, torch.eye(16), {"model.up": CONFIG})


@pytest.mark.usefixtures("small_texts")
@pytest.mark.parametrize("method", ["w8a8", "fp8"])
def test_the_papers_own_rounding_is_one_option_away(method: Any, tmp_path: Path) -> None:
    source = save_model(tmp_path / "tiny", tied=False)
    reports = {
        rounding: quantize(
            source, QuantizeConfig(**{**W8A8, "method": method, "rounding": rounding}), output=tmp_path / rounding
        )
        for rounding in ("gptq", "nearest")
    }
    cards = {rounding: (tmp_path / rounding / "README.md").read_text() for rounding in reports}
    assert f"--method {method} --rounding nearest" in cards["nearest"]
    assert "--damp" not in cards["nearest"]
    assert f"--method {method} --calibration" in cards["gptq"]
    assert ", smoothed, " in cards["gptq"]
    assert "per output (by GPTQ)" in cards["gptq"]
    assert "--damp 0.05" in cards["gptq"]
    assert reports["gptq"].bytes_after == pytest.approx(reports["nearest"].bytes_after, rel=0.01)
    sections = [read_json(tmp_path / name / "config.json")["quantization_config"] for name in reports]
    assert sections[0] == sections[1]
    layer = VerifierCheckpoint(tmp_path / "nearest").layer("model.layers.0.self_attn.o_proj")  # which is not smoothed
    original = tensors_of(source)["model.layers.0.self_attn.o_proj.weight"]
    number_format: EightBitFormat = Int8Format() if method == "w8a8" else E4M3Format()
    assert torch.equal(layer.dequantize(), number_format.round_weight(original).dequantize())
    means = [sum(report.layer_errors.values()) for report in reports.values()]
    assert means[0] < means[1]


def test_roundings_that_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="--rounding must be gptq or nearest, not down"):
        QuantizeConfig(**{**W8A8, "rounding": "down"})
    assert run(["quantize", "demo", "--rounding", "nearest", "--mixed"]) == 2
    assert "--rounding nearest reads no text" in capsys.readouterr().err


@pytest.mark.parametrize("number_format", NUMBERS, ids=["integers", "floats"])
def test_pieces_of_a_layer_are_solved_as_the_whole(
    number_format: EightBitFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, weight = inputs(300, 48), layer(40, 48)
    hessian = 2 / 300 * rows.t() @ rows
    whole = solve_eight_bits(number_format, {"a": weight}, hessian, {"a": CONFIG})["a"]
    monkeypatch.setattr(gptq, "PIECE_WEIGHTS", 48 * 7)
    pieces = solve_eight_bits(number_format, {"a": weight}, hessian, {"a": CONFIG})["a"]
    assert (pieces.weight.dequantize() == whole.weight.dequantize()).double().mean() > 0.95  # but for ties
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-3)


def test_a_block_in_16_bits_is_rounded_from_its_smoothed_weights_in_32() -> None:
    """What the block holds of them has lost digits; norms tell the factors."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=1, **shape)).bfloat16().eval()
    model.model.embed_tokens.weight.data[:, 5] *= 40
    block = model.model.layers[0]
    weight, norm = block.self_attn.q_proj.weight.float(), block.input_layernorm.weight.float()
    with torch.inference_mode():
        activations = capture_first_inputs(model, torch.arange(40).view(2, 20))
        prepared = EightBitMethod(Int8Format(), smooth=True, solved=False)(block, "b", activations)
    name = "b.self_attn.q_proj"
    held = block.self_attn.q_proj.weight
    found = prepared.solve({name: held}, torch.eye(32), {name: CONFIG})[name].weight.dequantize()
    factors = norm / block.input_layernorm.weight.float()
    assert torch.equal(found, Int8Format().round_weight(weight * factors).dequantize())
    assert held.dtype == torch.bfloat16
    assert not torch.equal(held.float(), weight * factors)


@pytest.mark.parametrize("number_format", NUMBERS, ids=["integers", "floats"])
def test_a_commit_keeps_every_value_and_scale(number_format: EightBitFormat, tmp_path: Path) -> None:
    """Scales have bfloat16's digits, in which they are stored."""
    rows, weight = inputs(300, 32), layer(16, 32)
    solved = solve_eight_bits(number_format, {"a.b": weight}, 2 / 300 * rows.t() @ rows, {"a.b": CONFIG})["a.b"]
    write_commit(tmp_path / "block", QuantizedBlock({"a.b": solved.weight}, {"a.b": 0.0}, layout="compressed-tensors"))
    again = read_commit(tmp_path / "block").weights["a.b"]
    assert torch.equal(again.dequantize(), solved.weight.dequantize())


@pytest.mark.usefixtures("small_texts")
def test_a_run_that_is_resumed_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smoothed blocks are smoothed again, since the reference goes through them."""
    from quasar_core.quantize.blocks import layerwise

    source, config = save_model(tmp_path / "tiny", tied=False), QuantizeConfig(**W8A8)
    straight = tensors_of(Path(quantize(source, config, output=tmp_path / "straight").checkpoint))
    original = layerwise.write_commit

    def fail_at_second(path: Path, *arguments: Any) -> None:
        if path.name.endswith("1.safetensors"):
            raise QuasarError("interrupted")
        original(path, *arguments)

    monkeypatch.setattr(layerwise, "write_commit", fail_at_second)
    with pytest.raises(QuasarError, match="interrupted"):
        quantize(source, config, output=tmp_path / "resumed")
    monkeypatch.setattr(layerwise, "write_commit", original)
    resumed = tensors_of(Path(quantize(source, config, output=tmp_path / "resumed").checkpoint))
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(tensor, straight[name]) for name, tensor in resumed.items())
