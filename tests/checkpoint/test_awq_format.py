"""AWQ's checkpoints: codes in their order, norms of their own, and what does not fit refused in a sentence."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.awq_checkpoints import change_config, pack, quantize_layer, write_awq
from helpers.quantize_cases import save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quasar_core.api import decoding, quantizing
from quasar_core.checkpoint.awq_format import AwqFormat
from quasar_core.checkpoint.headers import stored_layers
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.config import GenerationConfig
from quasar_core.errors import QuasarError
from quasar_core.models.loading import load_models

CPU = torch.device("cpu")
PROMPT = [5, 9, 12, 7, 5, 9]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("awq")
    source = save_model(folder / "tiny", tied=False)
    plain = write_awq(source, folder / "awq")
    shutil.copytree(source, folder / "plain")
    save_file(
        {name: tensor.float().contiguous() for name, tensor in plain.items()}, folder / "plain" / "model.safetensors"
    )
    return folder


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    outputs=st.sampled_from([8, 16, 40]),
    groups=st.integers(1, 3),
    size=st.sampled_from([16, 32]),
    seed=st.integers(0, 2**16),
)
def test_codes_are_read_in_their_order(outputs: int, groups: int, size: int, seed: int) -> None:
    weight = torch.randn(outputs, groups * size, generator=torch.Generator().manual_seed(seed))
    stored, stands_for = quantize_layer(weight, size)
    read = AwqFormat(size).unpack("a.b", stored)
    assert torch.equal(read.dequantize(), stands_for)


def test_a_word_by_hand() -> None:
    """Eight codes 0 to 7 of one row: 0, 2, 4, 6 lie in the lowest four places, 1, 3, 5, 7 above."""
    assert pack(torch.arange(8)[None]).tolist() == [[0x75316420]]
    tensors = {
        "qweight": torch.tensor([[0x75316420]], dtype=torch.int32),
        "qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    assert AwqFormat(-1).unpack("a.b", tensors).dequantize().t().tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


def test_the_logits_are_those_of_the_weights_it_stands_for(made: Path) -> None:
    loaded = load_models(made / "tiny", VerifierCheckpoint(made / "awq"), CPU, torch.float32, kernel="dense")
    model = loaded.verifier
    assert model is not None
    got = model.forward(PROMPT, model.new_cache(len(PROMPT)))
    with torch.inference_mode():
        reference = AutoModelForCausalLM.from_pretrained(made / "plain", dtype=torch.float32)
        expected = reference(torch.tensor([PROMPT])).logits[0]
    assert torch.allclose(got, expected, atol=1e-3 * float(expected.abs().max()))


def test_it_verifies_and_the_text_is_the_models_own(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUASAR_HOME", str(tmp_path))
    record = quantizing.add_verifier(str(made / "awq"), str(made / "tiny"))
    assert record.added
    pair = decoding.load_pair(device="cpu")
    texts = [
        decoding.Generator(pair, GenerationConfig(40, verify, draft)).generate(PROMPT).token_ids
        for verify, draft in (("full", "none"), ("exact", "auto"))
    ]
    assert texts[0] == texts[1]


def test_sizes_are_told_by_headers(made: Path) -> None:
    checkpoint = VerifierCheckpoint(made / "awq")
    weights = load_file(made / "tiny" / "model.safetensors")
    layers = stored_layers(checkpoint)
    assert {layer.name: (layer.out_features, layer.in_features) for layer in layers} == {
        layer.name: tuple(weights[f"{layer.name}.weight"].shape) for layer in layers
    }
    assert {(layer.bits, layer.group_size) for layer in layers} == {(4, 32)}
    assert checkpoint.own_norms


def test_scaled_values_are_refused(made: Path, tmp_path: Path) -> None:
    """Both models share the cache that values lie in."""
    write_awq(made / "tiny", tmp_path / "awq", values_scaled=True)
    with pytest.raises(QuasarError, match=r"the outputs of model\.layers\.\d\.self_attn\.v_proj are scaled"):
        quantizing.add_verifier(str(tmp_path / "awq"), str(made / "tiny"))


def test_another_models_codes_are_refused(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "awq", tmp_path / "awq")
    weights = load_file(tmp_path / "awq" / "model.safetensors")
    name = "model.layers.0.self_attn.v_proj.qweight"
    weights[name] = weights[name].roll(3, 0)
    save_file(weights, tmp_path / "awq" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuasarError, match=r"the codes of model\.layers\.0\.self_attn\.v_proj do not stand for"):
        quantizing.add_verifier(str(tmp_path / "awq"), str(made / "tiny"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"version": "gemv"}, "by AWQ in the layout gemv; this version reads gemm"),
        ({"bits": 3}, "has 3-bit codes of AWQ"),
        ({"group_size": 0}, "has groups of 0"),
        ({"group_size": "128"}, "has groups of 128"),
    ],
)
def test_other_layouts_are_refused(made: Path, tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    shutil.copytree(made / "awq", tmp_path / "awq")
    change_config(tmp_path / "awq", lambda config: config["quantization_config"].update(change))  # type: ignore[attr-defined]
    with pytest.raises(QuasarError, match=sentence):
        VerifierCheckpoint(tmp_path / "awq")


@pytest.mark.parametrize(
    ("odd", "sentence"),
    [
        ({"qzeros": None}, "has no qzeros"),
        ({"qweight": torch.zeros(64, dtype=torch.int32)}, r"has qweight of shape \(64,\)"),
        ({"qweight": torch.zeros(48, 2, dtype=torch.int32)}, "48 inputs, no multiple of the group of 32"),
        ({"scales": torch.ones(1, 16)}, r"has scales of shape \(1, 16\), not \(2, 16\)"),
        ({"scales": torch.ones(2, 16, dtype=torch.int32)}, "has scales in int32"),
        ({"scales": torch.full((2, 16), 1e6)}, "has scales that are not finite"),
        ({"qweight": torch.zeros(64, 2)}, "has qweight in float32"),
    ],
)
def test_odd_tensors_are_refused(odd: dict[str, torch.Tensor | None], sentence: str) -> None:
    stored = {**quantize_layer(torch.randn(16, 64, generator=torch.Generator().manual_seed(0)))[0], **odd}
    present = {name: tensor for name, tensor in stored.items() if tensor is not None}
    with pytest.raises(QuasarError, match=sentence):
        AwqFormat(32).unpack("a.b", present)
