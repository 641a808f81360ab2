"""Our checkpoints in transformers with optimum and GPTQModel, and theirs here. `make interop` installs both."""

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from quasar_cli import main
from quasar_core.checkpoint.reader import TensorFiles, VerifierCheckpoint
from quasar_core.checkpoint.writer import copy_kept_files
from quasar_core.config import QuantizeConfig
from quasar_core.models.pair import load_tokenizer
from quasar_core.models.transformers_lm import TransformersLM, attach_verifier
from quasar_core.quantize.layerwise import capture_first_inputs, quantize_blocks, quantize_head
from quasar_core.quantize.optimum_backend import quantize_with_optimum
from quasar_core.quantize.run import Job, assemble, solver_config
from quasar_core.store.names import demo_folder

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("optimum", "gptqmodel")),
        reason="optimum and gptqmodel are not installed; `make interop` installs them",
    ),
]

DEMO = demo_folder()
needs_demo = pytest.mark.skipif(
    not (DEMO / "model.safetensors").exists(), reason="the demo model is not in this checkout"
)
# Both sides multiply in float32 by the same dequantized weights; GPTQModel dequantizes in float16.
TOLERANCE = 1e-3
# Theirs computes in float16 throughout.
HALF_TOLERANCE = 2e-2
PROMPT = list(range(3, 43))


def tiny_llama() -> PreTrainedModel:
    """Two blocks with biased projections and a head of their own."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    )
    return LlamaForCausalLM(config)


def tiny_qwen3() -> PreTrainedModel:
    """Two blocks with normed queries and keys, and a head tied to the embedding."""
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """GPTQModel compiles its dequantization, which would take half a minute a model."""
    with torch.compiler.set_stance("force_eager"):
        yield


def randomly_initialised(make: Callable[[], PreTrainedModel]) -> TransformersLM:
    """The same weights every time, biases included."""
    torch.manual_seed(0)
    model = make()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return TransformersLM(model)


def write_checkpoint(target: TransformersLM, config: QuantizeConfig, folder: Path) -> VerifierCheckpoint:
    """Quantize a model on random tokens with our solver and write it with our writer."""
    source = folder / "source"
    target.model.save_pretrained(source)
    job = Job("tiny", source, "fingerprint", folder / "verifier", config)
    job.commits.mkdir(parents=True)
    batches = capture_first_inputs(target.model, torch.randint(0, 128, (8, 32)))
    blocks = list(quantize_blocks(target.model, batches, solver_config(config), job.commits))
    if config.lm_head_bits < 16:
        head = quantize_head(target.model, batches, solver_config(config, config.lm_head_bits), job.commits)
        assert head is not None
        blocks.append(head)
    assemble(job, target, blocks)
    return VerifierCheckpoint(job.partial)


def their_logits(folder: Path, bits: int, backend: str) -> torch.Tensor:
    """Logits [T, V] through transformers, optimum and one of GPTQModel's kernels."""
    from transformers import GPTQConfig

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", quantization_config=GPTQConfig(bits=bits, backend=backend)
    )
    assert "Linear" in type(model.model.layers[0].mlp.up_proj).__name__
    assert not isinstance(model.model.layers[0].mlp.up_proj, torch.nn.Linear)
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits[0].float()


def our_logits(target: TransformersLM, checkpoint: VerifierCheckpoint) -> torch.Tensor:
    """Logits [T, V] through our reference kernel."""
    verifier = attach_verifier(target, checkpoint, kernel="reference")
    return verifier.forward(PROMPT, verifier.new_cache(len(PROMPT)))


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3])
@pytest.mark.parametrize(
    ("bits", "group_size", "sym"),
    [(2, 32, True), (3, 64, True), (4, 128, True), (4, 32, False), (4, -1, True), (8, 64, True), (8, -1, False)],
)
def test_our_checkpoint_gives_the_same_logits_there(
    make: Callable[[], PreTrainedModel], bits: int, group_size: int, sym: bool, tmp_path: Path
) -> None:
    config = QuantizeConfig(bits=bits, group_size=group_size, sym=sym)
    target = randomly_initialised(make)
    checkpoint = write_checkpoint(target, config, tmp_path)
    ours = our_logits(target, checkpoint)
    theirs = their_logits(checkpoint.folder, bits, "gptq_torch")
    assert ours.std() > 0.1
    torch.testing.assert_close(theirs, ours, rtol=0, atol=TOLERANCE)


@needs_demo
@pytest.mark.parametrize("head_bits", [4, 8])
def test_a_quantized_head_loads_in_gptqmodel(head_bits: int, tmp_path: Path) -> None:
    """Through GPTQModel itself, in float16: optimum knows no quantized head."""
    from gptqmodel import BACKEND, GPTQModel

    target = randomly_initialised(tiny_qwen3)
    checkpoint = write_checkpoint(target, QuantizeConfig(group_size=64, lm_head_bits=head_bits), tmp_path)
    copy_kept_files(DEMO, checkpoint.folder)  # it asks for a tokenizer
    ours = our_logits(target, checkpoint)
    loaded = GPTQModel.load(str(checkpoint.folder), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
    assert not isinstance(loaded.model.lm_head, torch.nn.Linear)
    with torch.no_grad():
        theirs = loaded.model(torch.tensor([PROMPT])).logits[0].float()
    torch.testing.assert_close(theirs, ours, rtol=0, atol=HALF_TOLERANCE)


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
    for name, weight in (item for block in blocks for item in block.weights.items()):
        wanted = original.load(f"{name}.weight").float()
        error = (weight.dequantize() - wanted).norm() / wanted.norm()
        assert weight.has_trivial_groups
        assert error < 3 / 2**bits, name


@needs_demo
def test_a_checkpoint_of_theirs_runs_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QUASAR_HOME", str(tmp_path))
    quantize = "quantize demo --backend optimum --samples 8 --seq-len 64 --json"
    assert main.run(quantize.split()) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["config"]["backend"] == "optimum"
    assert report["fidelity"]["agreement"] > 0.5
    generate = ["generate", "--raw", "--prompt", "def ", "--max-new-tokens", "16", "--json"]
    assert main.run(generate) == 0
    exact = json.loads(capsys.readouterr().out)
    assert main.run([*generate, "--verify", "full", "--draft", "none"]) == 0
    assert exact["verifier"] == "demo-gptq-4bit-g128"
    assert exact["token_ids"] == json.loads(capsys.readouterr().out)["token_ids"]
