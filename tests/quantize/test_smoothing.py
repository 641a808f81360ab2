"""SmoothQuant: exact until something is rounded, and better after; W8A8 and fp8 checkpoints from end to end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.quantize_cases import quantize, save_model, tensors_of

from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.config import QuantizeConfig
from quasar_core.errors import UsageError
from quasar_core.files import read_json
from quasar_core.models.hf import causal_lm
from quasar_core.models.weights import lean_weights
from quasar_core.quantize.blocks.eight_bit import EightBitMethod
from quasar_core.quantize.solve.eight_bit import (
    E4M3Format,
    InputSample,
    Int8Format,
    fold_into_norm,
    search_smoothing,
    smoothing_factors,
)

pytest_plugins = ["helpers.quantize_fixtures"]
CPU = torch.device("cpu")
W8A8 = QuantizeConfig(method="w8a8", bits=8, group_size=-1, samples=6, seq_len=24)


def outlying_rows() -> torch.Tensor:
    """Activations as language models have them: a few channels a hundred times as large as the others."""
    rows = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    rows[:, [3, 40]] *= 100
    return rows


def test_factors_move_outliers_by_equation_4() -> None:
    weight = torch.full((8, 64), 0.5)
    largest = torch.ones(64)
    largest[3] = 16
    factors = smoothing_factors(largest, [weight, weight / 2], 0.5)
    assert (factors[3] / factors[0]).item() == pytest.approx(4)  # 16 ** 0.5
    assert (factors.amax() * factors.amin()).item() == pytest.approx(1)
    heavier = weight.clone()
    heavier[:, 7] = 8
    factors = smoothing_factors(torch.ones(64), [weight, heavier], 0.5)
    assert (factors[7] / factors[0]).item() == pytest.approx(0.25)  # 16 ** −0.5


def test_the_search_finds_a_strength_that_pays() -> None:
    rows = outlying_rows()
    weights = [torch.randn(16, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    sample = InputSample(rows.abs().amax(dim=0), rows)
    found = search_smoothing(sample, weights, Int8Format())
    assert found.strength is not None

    def error(factors: torch.Tensor) -> float:
        rounded = Int8Format().round_rows(rows / factors)
        kept = [Int8Format().round_weight(weight * factors).dequantize() for weight in weights]
        return sum(float((rounded @ w.t() - rows @ o.t()).square().sum()) for w, o in zip(kept, weights, strict=True))

    assert found.error == pytest.approx(error(found.factors), rel=1e-3)
    assert found.error < 0.2 * error(torch.ones(64)), "of random weights 0.05 to 0.08 is left"


def test_nothing_is_smoothed_where_nothing_pays() -> None:
    rows = torch.ones(50, 64)
    found = search_smoothing(InputSample(rows.amax(dim=0), rows), [torch.ones(4, 64)], Int8Format())
    assert found.strength is None
    assert torch.equal(found.factors, torch.ones(64))


def test_a_norm_takes_up_what_its_dtype_can_hold() -> None:
    norm = torch.tensor([1.0, 0.0, 0.7], dtype=torch.bfloat16)
    folded, factors = fold_into_norm(norm, torch.tensor([3.0, 5.0, 0.3]))
    assert folded.dtype == torch.bfloat16
    assert folded[1] == 0
    assert factors[1] == 1
    assert torch.allclose(folded.float() * factors, norm.float(), rtol=1e-6)
    assert factors.tolist() == pytest.approx([3, 1, 0.3], rel=4e-3)


@pytest.mark.parametrize("biased", [False, True])
def test_a_smoothed_block_computes_what_it_did(biased: bool, tmp_path: Path) -> None:
    """Norms divided, columns multiplied: the same function, to float32's rounding, with other norms than before."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from quasar_core.quantize.blocks.activations import capture_first_inputs, run_block

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=50, num_hidden_layers=1, attention_bias=biased, mlp_bias=biased, **shape)
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.model.embed_tokens.weight.data[:, 5] *= 40
    with torch.inference_mode():
        activations = capture_first_inputs(model, torch.arange(40).view(2, 20))
        block = model.model.layers[0]
        before = run_block(block, activations.first_row())
        norm = block.input_layernorm.weight.clone()
        up = block.mlp.up_proj.weight.clone()
        EightBitMethod(Int8Format(), smooth=True)(block, "model.layers.0", activations)
        after = run_block(block, activations.first_row())
    assert not torch.allclose(block.input_layernorm.weight, norm, rtol=0.05)
    assert not torch.allclose(block.mlp.up_proj.weight, up, rtol=0.05)
    assert torch.allclose(after, before, atol=2e-5)


@pytest.mark.usefixtures("small_texts")
@pytest.mark.parametrize(("method", "kernel"), [("w8a8", "int8"), ("fp8", "float8")])
def test_a_checkpoint_stands_for_the_model(method: str, kernel: str, tmp_path: Path) -> None:
    """Its own norms included: alone, beside its target, by both decoders; and the report tells what runs."""
    source = save_model(tmp_path / "tiny", tied=False)
    report = quantize(source, QuantizeConfig(**{**W8A8.__dict__, "method": method}))
    folder = Path(report.checkpoint)
    assert folder.name == f"tiny-{method}"
    section = read_json(folder / "config.json")["quantization_config"]
    assert (section["quant_method"], section["format"]) == (
        "compressed-tensors",
        "int-quantized" if method == "w8a8" else "float-quantized",
    )
    assert not (folder / "quantize_config.json").exists()
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(tensors_of(folder)[norm], tensors_of(source)[norm])
    checkpoint = VerifierCheckpoint(folder)
    tokens = list(range(1, 20))
    target = causal_lm.load_target(source, CPU, torch.float32)
    logits = {}
    for library in (causal_lm, lean_weights):
        own = library.load_target(source, CPU, torch.float32)
        for verifier in (
            library.attach_verifier(own, checkpoint, "dense"),
            library.load_verifier_alone(checkpoint, CPU, torch.float32, "dense"),
        ):
            logits[len(logits)] = verifier.forward(tokens, verifier.new_cache(32))
    for other in list(logits.values())[1:]:
        assert torch.allclose(other, logits[0], atol=1e-4 * logits[0].abs().max().item())
    exact = target.forward(tokens, target.new_cache(32))
    verifier = lean_weights.load_verifier_alone(checkpoint, CPU, torch.float32, kernel)
    rounded = verifier.forward(tokens, verifier.new_cache(32))
    bound = 0.06 if method == "w8a8" else 0.25
    assert 0 < (logits[0] - exact).norm() < (rounded - exact).norm() < bound * exact.norm()
    assert report.bits_per_weight == pytest.approx(8, abs=0.7)
    assert len(report.layer_errors) == 14
    assert max(report.layer_errors.values()) < 0.01


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bits": 4}, "--method w8a8 has 8 bits and one scale per output, and leaves the head: leave --bits out"),
        ({"group_size": 128}, "leave --group-size out"),
        ({"lm_head_bits": 8}, "leave --lm-head-bits out"),
        ({"sym": False}, "leave --sym out"),
        ({"backend": "optimum"}, "leave --backend out"),
        ({"method": "awq"}, "--method must be one of gptq, w8a8, fp8, not awq"),
    ],
)
def test_options_that_8_bits_do_not_have(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        QuantizeConfig(**{**W8A8.__dict__, **options})


def test_numbers_round_activations_as_their_kernels_do() -> None:
    rows = outlying_rows()
    assert (Int8Format().round_rows(rows) - rows).abs().max() <= rows.abs().max() / 127 / 2 * 1.001
    assert ((E4M3Format().round_rows(rows) - rows).abs() <= rows.abs() / 16 + rows.abs().amax() / 448 / 64).all()
    assert json.dumps(float(E4M3Format().round_rows(rows)[0, 0]))
