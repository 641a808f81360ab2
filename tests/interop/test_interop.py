"""Our checkpoints in transformers with optimum and GPTQModel, and theirs here. `make interop` installs both."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.config import QuantizeConfig
from quasar_core.models.transformers_lm import TransformersLM, load_verifier_alone
from quasar_core.quantize.layerwise import capture_first_inputs, quantize_blocks
from quasar_core.quantize.run import Job, assemble, solver_config

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("optimum", "gptqmodel")),
        reason="optimum and gptqmodel are not installed; `make interop` installs them",
    ),
]

# Both sides multiply in float32 by the same dequantized weights; GPTQModel dequantizes in float16.
TOLERANCE = 2e-3
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


def write_checkpoint(make: Callable[[], PreTrainedModel], config: QuantizeConfig, folder: Path) -> VerifierCheckpoint:
    """Quantize a tiny random model on random tokens with our solver and write it with our writer."""
    torch.manual_seed(0)
    model = make().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    source = folder / "source"
    model.save_pretrained(source)
    job = Job("tiny", source, "fingerprint", folder / "verifier", config)
    job.commits.mkdir(parents=True)
    batches = capture_first_inputs(model, torch.randint(0, 128, (8, 32)))
    blocks = list(quantize_blocks(model, batches, solver_config(config), job.commits))
    assemble(job, TransformersLM(model), blocks)
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


def our_logits(checkpoint: VerifierCheckpoint) -> torch.Tensor:
    """Logits [T, V] through our reference kernel, without the target."""
    verifier = load_verifier_alone(checkpoint, torch.device("cpu"), torch.float32, kernel="reference")
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
    checkpoint = write_checkpoint(make, config, tmp_path)
    ours = our_logits(checkpoint)
    theirs = their_logits(checkpoint.folder, bits, "gptq_torch")
    assert ours.std() > 0.1
    torch.testing.assert_close(theirs, ours, rtol=0, atol=TOLERANCE)
