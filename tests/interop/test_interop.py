"""Our GPTQ checkpoints in transformers with optimum and GPTQModel, and theirs here. `make interop` installs both."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.awq_checkpoints import write_awq
from interop.interop_cases import (
    ARCHITECTURES,
    DEMO,
    assert_same_logits,
    logits_by_optimum,
    logits_of,
    missing,
    our_logits,
    quantize,
    quantize_with_gptqmodel,
    save_model,
)

from quasar_cli import main
from quasar_core.checkpoint.headers import stored_layers
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.config import QuantizeConfig
from quasar_core.models.describe import describe
from quasar_core.models.pair import load_tokenizer
from quasar_core.quantize.optimum_backend import quantize_with_optimum

pytestmark = [pytest.mark.interop, missing("optimum", "gptqmodel")]
needs_demo = pytest.mark.skipif(
    not (DEMO / "model.safetensors").exists(), reason="the demo model is not in this checkout"
)


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """GPTQModel compiles its dequantization, which would take half a minute a model."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize(
    ("bits", "group_size", "sym"),
    [(2, 32, True), (3, 64, True), (4, 128, True), (4, 32, False), (4, -1, True), (8, 64, True), (8, -1, False)],
)
def test_every_layout_gives_the_same_logits_there(
    bits: int, group_size: int, sym: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_model(tmp_path / "tiny", "llama")
    folder = quantize(monkeypatch, source, bits=bits, group_size=group_size, sym=sym)
    ours = our_logits(folder)
    assert ours.std() > 0.1
    assert_same_logits(logits_by_optimum(folder), ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_gives_the_same_logits_there(
    architecture: str, tied: bool, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 to the rounding of their float16 weights, and in the dtype that the checkpoint is stored in."""
    folder = quantize(monkeypatch, save_model(tmp_path / "tiny", architecture, tied, dtype), group_size=64)
    assert VerifierCheckpoint(folder).tensors.load("model.norm.weight").dtype == dtype
    assert_same_logits(logits_by_optimum(folder), our_logits(folder))
    assert_same_logits(logits_by_optimum(folder, dtype), our_logits(folder, dtype), dtype)


@pytest.mark.parametrize("head_bits", [4, 8])
def test_a_quantized_head_loads_in_gptqmodel(head_bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through GPTQModel itself, in float16: optimum knows no quantized head."""
    from gptqmodel import BACKEND, GPTQModel

    source = save_model(tmp_path / "tiny", "qwen3", tied=True)
    folder = quantize(monkeypatch, source, group_size=64, lm_head_bits=head_bits)
    loaded = GPTQModel.load(str(folder), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
    assert not isinstance(loaded.model.lm_head, torch.nn.Linear)
    assert_same_logits(logits_of(loaded.model), our_logits(folder), torch.float16)


def test_widths_by_layer_load_in_gptqmodel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rules under the layers' own names, beside those for fused ones; optimum knows one width alone."""
    from gptqmodel import BACKEND, GPTQModel

    folder = quantize(monkeypatch, save_model(tmp_path / "tiny", "qwen3"), group_size=64, mean_bits=4.25)
    layers = stored_layers(VerifierCheckpoint(folder))
    assert len({layer.bits for layer in layers}) > 1
    loaders = describe(VerifierCheckpoint(folder))["loaders"]
    assert loaders["GPTQModel"] == "yes"
    assert loaders["transformers"].startswith("no: optimum reads all layers at")
    loaded = GPTQModel.load(str(folder), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
    assert_same_logits(logits_of(loaded.model), our_logits(folder), torch.float16)
    with pytest.raises((RuntimeError, AssertionError)):
        assert_same_logits(logits_by_optimum(folder), our_logits(folder))


def test_a_last_group_cut_short_loads_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 160 inputs in groups of 128; vLLM refuses it, as `inspect` says."""
    folder = quantize(monkeypatch, save_model(tmp_path / "tiny", "llama", hidden_size=160), group_size=128)
    loaders = describe(VerifierCheckpoint(folder))["loaders"]
    assert loaders["transformers"] == loaders["GPTQModel"] == "yes"
    assert loaders["vLLM"].startswith("no: 160 inputs are not a multiple of the group of 128")
    assert_same_logits(logits_by_optimum(folder), our_logits(folder))


THEIRS: dict[str, dict[str, Any]] = {
    "version 1": {"format": "gptq"},
    "version 2": {"format": "gptq_v2"},
    "version 1, asymmetric": {"format": "gptq", "sym": False},
    "version 2, asymmetric": {"format": "gptq_v2", "sym": False},
    "act-order": {"format": "gptq", "desc_act": True, "act_group_aware": False},
    "act-order, asymmetric": {"format": "gptq_v2", "desc_act": True, "act_group_aware": False, "sym": False},
    "widths of their own": {
        "format": "gptq",
        "dynamic": {r"+:.*\.down_proj.*": {"bits": 8, "group_size": 64}, r"-:.*\.0\.self_attn\.o_proj.*": {}},
    },
}


@pytest.mark.parametrize("options", THEIRS.values(), ids=THEIRS.keys())
def test_their_checkpoint_is_a_verifier_here(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same logits, and `quasar generate` verifies with it: alone, and confirmed by its target."""
    monkeypatch.setenv("QUASAR_HOME", str(tmp_path / "home"))
    source = save_model(tmp_path / "tiny", "qwen3", dtype=torch.float16)
    theirs = logits_of(quantize_with_gptqmodel(source, tmp_path / "theirs", options))
    checkpoint = VerifierCheckpoint(tmp_path / "theirs")
    if options.get("desc_act"):
        assert not checkpoint.layer("model.layers.0.mlp.up_proj").has_trivial_groups
    if "dynamic" in options:
        assert checkpoint.layer("model.layers.0.mlp.down_proj").bits == 8
        assert "model.layers.0.self_attn.o_proj" not in checkpoint.layer_names
    assert_same_logits(theirs, our_logits(tmp_path / "theirs"), torch.float16)
    capsys.readouterr()
    command = ["generate", "-m", str(source), "--raw", "--prompt", "abcabc", "-n", "12", "--dtype", "float32", "--json"]
    assert main.run([*command, "--verifier", str(tmp_path / "theirs")]) == 0
    exact = json.loads(capsys.readouterr().out)
    assert main.run([*command, "--verify", "full", "--draft", "none"]) == 0
    assert exact["token_ids"] == json.loads(capsys.readouterr().out)["token_ids"]
    assert main.run([*command, "--verifier", str(tmp_path / "theirs"), "--verify", "quantized"]) == 0
    assert json.loads(capsys.readouterr().out)["stats"]["steps"] > 0


def test_an_awq_checkpoint_gives_the_same_logits_there(tmp_path: Path) -> None:
    """Of the helper that the tests of AWQ's format go by: GPTQModel makes such checkpoints on GPUs alone."""
    from gptqmodel import BACKEND, GPTQModel

    source = save_model(tmp_path / "tiny", "qwen3", dtype=torch.float16)
    write_awq(source, tmp_path / "awq")
    theirs = GPTQModel.load(str(tmp_path / "awq"), backend=BACKEND.TORCH_AWQ, device="cpu", dtype=torch.float16).model
    assert_same_logits(logits_of(theirs), our_logits(tmp_path / "awq", torch.float16), torch.float16)


@needs_demo
@pytest.mark.parametrize(
    ("bits", "group_size", "sym", "act_order"),
    [(4, 128, True, True), (4, 32, False, True), (3, 64, True, False), (8, -1, True, True), (2, 32, False, False)],
)
def test_their_codes_stand_for_the_weights(bits: int, group_size: int, sym: bool, act_order: bool) -> None:
    config = QuantizeConfig(bits=bits, group_size=group_size, sym=sym, act_order=act_order, backend="optimum")
    samples = torch.randint(0, 2048, (8, 64), generator=torch.Generator().manual_seed(0))
    seen: list[tuple[int, int]] = []
    blocks = quantize_with_optimum(
        DEMO, load_tokenizer(DEMO), samples, config, lambda _, done, total: seen.append((done, total))
    )
    assert seen == [(done, len(blocks)) for done in range(len(blocks) + 1)]
    original = TensorFiles(DEMO)
    for block in blocks:
        for name in block.weights:
            wanted = original.load(f"{name}.weight").float()
            error = (block.dense(name, torch.float32) - wanted).norm() / wanted.norm()
            assert error < 3 / 2**bits, name


@needs_demo
def test_a_checkpoint_of_the_backend_runs_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QUASAR_HOME", str(tmp_path))
    command = "quantize demo --backend optimum --samples 8 --seq-len 64 --json"
    assert main.run(command.split()) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["config"]["backend"] == "optimum"
    assert report["fidelity"]["agreement"] > 0.5
    generate = ["generate", "--raw", "--prompt", "def ", "--max-new-tokens", "16", "--json"]
    assert main.run(generate) == 0
    exact = json.loads(capsys.readouterr().out)
    assert main.run([*generate, "--verify", "full", "--draft", "none"]) == 0
    assert exact["verifier"] == "demo-gptq-4bit-g128"
    assert exact["token_ids"] == json.loads(capsys.readouterr().out)["token_ids"]
