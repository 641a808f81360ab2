"""Mixtures of experts on the lean decoder: forms of files, what is read, what is refused, and decoding."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import (
    CASES,
    CPU,
    FLOAT,
    LENGTH,
    assert_close,
    classes_of,
    fresh_logits,
    in_passes,
    random_tokens,
    save_model,
)
from helpers.moe_models import qwen3_moe, save
from helpers.quantize_cases import quantize
from helpers.tiny_model import save_tiny_model
from helpers.tiny_models import make_pair
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.config import GenerationConfig, VerifyMode
from quasar_core.decode.generator import Generator
from quasar_core.errors import QuasarError
from quasar_core.files import read_json
from quasar_core.models.architectures import ARCHITECTURES
from quasar_core.models.config.decoder import why_not_lean
from quasar_core.models.config.mixture import MixtureConfig
from quasar_core.models.decoder.experts import route
from quasar_core.models.drafting.skipping import bytes_of, bytes_read
from quasar_core.models.loading import attach, load_models
from quasar_core.models.weights.lean_weights import attach_verifier, load_target, load_verifier_alone

pytest_plugins = ["helpers.quantize_fixtures"]
MIXTURES = {
    name: (family, options)
    for name, (family, options) in CASES.items()
    if (row := ARCHITECTURES[f"{family}ForCausalLM"].mixture) and (not row.option or options.get(row.option))
}


@pytest.mark.parametrize("case", MIXTURES)
def test_files_with_all_experts_in_one_tensor_are_the_same_model(tmp_path: Path, case: str) -> None:
    """As transformers 5 writes them where it is not asked for the older names."""
    model = save_model(tmp_path / "apart", *MIXTURES[case])
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    with safe_open(tmp_path / "stacked" / "model.safetensors", "pt") as file:
        assert any(name.endswith("experts.gate_up_proj") for name in file.keys())  # noqa: SIM118
    tokens = random_tokens()
    expected = in_passes(load_target(tmp_path / "apart", CPU, FLOAT), tokens, [20, 1, 4])
    assert torch.equal(in_passes(load_target(tmp_path / "stacked", CPU, FLOAT), tokens, [20, 1, 4]), expected)
    assert load_models(tmp_path / "stacked", None, CPU, FLOAT).notes[0] == "decoder: our own"


@pytest.mark.parametrize("form", ["apart", "stacked"])
@pytest.mark.usefixtures("small_texts")
def test_a_quantized_mixture_runs_on_our_decoder_with_its_target_and_alone(tmp_path: Path, form: str) -> None:
    source = save(tmp_path / "tiny", qwen3_moe)
    if form == "stacked":
        _, model_class = classes_of("Qwen3Moe")
        model_class.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source, save_original_format=False)
    checkpoint = VerifierCheckpoint(Path(quantize(source).checkpoint))
    assert "model.layers.1.mlp.experts.2.up_proj" in checkpoint.layer_names
    target, tokens = load_target(source, CPU, FLOAT), random_tokens(30)
    attached = in_passes(attach_verifier(target, checkpoint, "dense"), tokens, [9, 1, 4])
    alone = in_passes(load_verifier_alone(checkpoint, CPU, FLOAT, "dense"), tokens, [9, 1, 4])
    assert torch.equal(attached, alone)
    assert not torch.allclose(attached, in_passes(target, tokens, [9, 1, 4]), atol=1e-3)


@pytest.mark.usefixtures("small_texts")
def test_experts_beside_mlps_are_quantized_as_the_mlps_are(tmp_path: Path) -> None:
    family, options = CASES["gemma 4, experts"]
    save_tiny_model(tmp_path / "tiny")
    save_model(tmp_path / "tiny", family, {**options, "vocab_size": 257})
    checkpoint = VerifierCheckpoint(Path(quantize(tmp_path / "tiny").checkpoint))
    for name in ("mlp.gate_proj", "experts.2.up_proj", "experts.5.down_proj"):
        assert f"model.layers.1.{name}" in checkpoint.layer_names
    assert not any("router" in name for name in checkpoint.layer_names)
    target, tokens = load_target(tmp_path / "tiny", CPU, FLOAT), random_tokens(30)
    attached = in_passes(attach_verifier(target, checkpoint, "dense"), tokens, [9, 1, 4])
    alone = in_passes(load_verifier_alone(checkpoint, CPU, FLOAT, "dense"), tokens, [9, 1, 4])
    assert torch.equal(attached, alone)
    assert not torch.allclose(attached, in_passes(target, tokens, [9, 1, 4]), atol=1e-3)


@pytest.mark.parametrize("verify", ["full", "exact", "quantized"])
@pytest.mark.usefixtures("small_texts")
def test_texts_are_those_of_plain_decoding(tmp_path: Path, verify: VerifyMode) -> None:
    source = save(tmp_path / "tiny", qwen3_moe)
    target = load_target(source, CPU, FLOAT)
    pair = make_pair(target, attach_verifier(target, VerifierCheckpoint(Path(quantize(source).checkpoint)), "dense"))
    alone = "quantized" if verify == "quantized" else "full"
    for prompt in ([5, 6, 7, 5, 6, 7], random_tokens(20)):
        plain = Generator(pair, GenerationConfig(60, alone, "none")).generate(prompt).token_ids
        assert Generator(pair, GenerationConfig(60, verify)).generate(prompt).token_ids == plain


@given(st.integers(0, 10_000), st.sampled_from(["softmax", "chosen", "sigmoid"]), st.booleans())
def test_routes_are_those_of_the_definition(seed: int, scores: Any, normalised: bool) -> None:
    """A sort of all experts of each token, in float64."""
    generator = torch.Generator().manual_seed(seed)
    values, correction = torch.randn(4, 7, generator=generator), torch.randn(7, generator=generator)
    row = ARCHITECTURES["Glm4MoeForCausalLM"].mixture
    assert row is not None
    corrected = None if scores != "sigmoid" else correction
    row = replace(row, added=0.25)  # more than any model adds
    chosen, shares = route(MixtureConfig(row, 7, 3, 32, scores, normalised, 1.5, 0, ""), values, corrected)
    for t, line in enumerate(values.double()):
        odds = line.sigmoid() if scores == "sigmoid" else line.softmax(0)
        rank = odds if corrected is None else odds + corrected
        best = sorted(range(7), key=lambda e: -float(rank[e]))[:3]
        assert chosen[t].tolist() == best
        added = 0.0 if scores == "chosen" else 0.25
        sums = scores == "chosen" or normalised
        expected = 1.5 * odds[best] / (odds[best].sum() + added if sums else 1)
        torch.testing.assert_close(shares[t].double(), expected, atol=1e-6, rtol=1e-5)


def test_an_option_of_dense_lfm2_is_nothing_to_its_mixtures(tmp_path: Path) -> None:
    expected = fresh_logits(save_model(tmp_path, *CASES["lfm2 moe"]), random_tokens())
    content = {**read_json(tmp_path / "config.json"), "block_auto_adjust_ff_dim": True}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert_close(in_passes(load_target(tmp_path, CPU, FLOAT), random_tokens(), [LENGTH]), expected)


@pytest.mark.usefixtures("cpp_pass")
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "C++"])
def test_a_token_reads_its_experts_alone(tmp_path: Path, fast: bool) -> None:
    """Weights of experts that nobody chose may be anything; a NaN in one that was chosen shows."""
    save_model(tmp_path, *CASES["qwen 3 moe"])
    decoder = load_target(tmp_path, CPU, FLOAT)
    if fast:
        attach(decoder)
        assert decoder.fast is not None
    for layer in decoder.layers:
        assert layer.experts is not None
        layer.experts.router.copy_(torch.randn(3, 64).repeat(2, 1))
        layer.experts.router[3:] *= -1  # three scores are above 0, and three are their negatives
    expected = in_passes(decoder, [5], [1])
    for layer in decoder.layers:
        runs = []
        for product in layer.experts.down:  # type: ignore[union-attr]
            whole = product.weight.clone()  # type: ignore[attr-defined]
            product.weight.fill_(torch.nan)  # type: ignore[attr-defined]
            runs.append(bool(in_passes(decoder, [5], [1]).isnan().any()))
            product.weight.copy_(whole)  # type: ignore[attr-defined]
        assert [one != other for one, other in zip(runs[:3], runs[3:], strict=True)] == [True] * 3
    assert torch.equal(in_passes(decoder, [5], [1]), expected)


def test_layer_skipping_counts_what_a_token_reads(tmp_path: Path) -> None:
    save_model(tmp_path, *CASES["qwen 3 moe"])
    layer = load_target(tmp_path, CPU, FLOAT).layers[0]
    attention = bytes_of(layer.qkv) + bytes_of(layer.out)
    assert bytes_read(layer) == attention + 3 * (3 * 32 * 64) * 4


def test_blocks_that_only_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    """Files of GLM-4.5 hold one behind the last block."""
    expected = fresh_logits(save_model(tmp_path, *CASES["glm 4 moe"]), random_tokens())
    tensors = load_file(tmp_path / "model.safetensors")
    further = {"model.layers.4.eh_proj.weight": torch.ones(2), "model.layers.4.mlp.up_proj.weight": torch.ones(3)}
    save_file({**tensors, **further}, tmp_path / "model.safetensors")
    assert read_json(tmp_path / "config.json")["num_nextn_predict_layers"] == 1
    assert_close(in_passes(load_target(tmp_path, CPU, FLOAT), random_tokens(), [45]), expected)
    save_file({**tensors, "model.layers.5.mlp.up_proj.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(QuasarError, match=r"holds model\.layers\.5\.mlp\.up_proj\.weight"):
        load_target(tmp_path, CPU, FLOAT)


@pytest.mark.parametrize(
    ("case", "changes", "reason"),
    [
        ("qwen 3 moe", {"num_experts_per_tok": 7}, "7 of 6 experts cannot be chosen"),
        ("dots 1", {"n_routed_experts": None, "num_local_experts": None}, "3 of 0 experts cannot be chosen"),
        ("qwen 3 moe", {"decoder_sparse_step": 0}, "its decoder_sparse_step is 0"),
        ("qwen 3 moe", {"use_sliding_window": True}, "it has no use_sliding_window of True"),
        ("glm 4 moe", {"n_group": 2}, "it has no n_group of 2"),
        ("dots 1", {"num_experts_per_tok": None}, "config.json has no num_experts_per_tok"),
        ("olmoe", {"clip_qkv": 8.0}, "it has no clip_qkv of 8.0"),
        ("lfm2 moe", {"num_experts_per_tok": 7}, "7 of 6 experts cannot be chosen"),
        ("lfm2 moe", {"num_dense_layers": None}, "config.json has no num_dense_layers"),
        ("granite 4, experts", {"num_experts_per_tok": 6}, "6 of 5 experts cannot be chosen"),
        ("granite moe shared", {"num_local_experts": 0}, "3 of 0 experts cannot be chosen"),
    ],
)
def test_what_a_mixture_lacks_is_a_reason(tmp_path: Path, case: str, changes: dict[str, Any], reason: str) -> None:
    save_model(tmp_path, *CASES[case])
    content = {**read_json(tmp_path / "config.json"), **changes}
    assert reason in str(why_not_lean(content))


def test_a_mixture_that_mlx_wrote_is_the_same_model(tmp_path: Path) -> None:
    """Three tensors of all experts, under names of its own, and metadata of another format."""
    expected = fresh_logits(save_model(tmp_path, *CASES["qwen 3 moe"]), random_tokens())
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(4):
        for part in ("gate_proj", "up_proj", "down_proj"):
            names = [f"model.layers.{layer}.mlp.experts.{e}.{part}.weight" for e in range(6)]
            stacked = torch.stack([tensors.pop(name) for name in names])
            tensors[f"model.layers.{layer}.mlp.switch_mlp.{part}.weight"] = stacked
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "mlx"})
    models = load_models(tmp_path, None, CPU, FLOAT)
    assert models.notes[0] == "decoder: our own"
    assert_close(in_passes(models.target, random_tokens(), [20, 1, 4]), expected)
