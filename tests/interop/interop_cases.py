"""What the tests with other packages share: tiny models of four architectures, and logits by each side."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_model import save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from quasar_core.api import quantizing
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.config import QuantizeConfig
from quasar_core.models.weights.lean_weights import load_verifier_alone
from quasar_core.quantize import calibration
from quasar_core.store.names import demo_folder

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with one worker its thread pool raises

CPU = torch.device("cpu")
DEMO = demo_folder()
PROMPT = list(range(3, 43))
VOCABULARY = 264
# Shares of the largest logit. In float32 the sides share their weights, which GPTQModel dequantizes in float16.
TOLERANCE = 2e-3
# Both sides compute in 16 bits, in other orders.
HALF_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 6e-2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
}


def missing(*packages: str) -> pytest.MarkDecorator:
    """Skip a module whose packages are not installed."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(
        bool(absent), reason=f"{' and '.join(absent)} not installed; `make interop` installs what is needed"
    )


def save_model(
    folder: Path, architecture: str, tied: bool = False, dtype: torch.dtype = torch.bfloat16, hidden_size: int = 128
) -> Path:
    """Two blocks of random weights, biases included, with a byte tokenizer; the same every time."""
    save_tiny_model(folder)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.08,
        eos_token_id=0,
        bos_token_id=None,
        **ARCHITECTURES[architecture],
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.to(dtype).save_pretrained(folder)
    return folder


def quantize(monkeypatch: pytest.MonkeyPatch, source: Path, output: Path | None = None, **options: Any) -> Path:
    """Our verifier of a folder, by the whole tool, on little text; beside it, or in `output`."""
    monkeypatch.setenv("QUASAR_HOME", str((output or source).parent / "home"))
    monkeypatch.setattr(calibration, "HELD_OUT_ROWS", 2)
    monkeypatch.setattr(calibration, "GREEDY_LENGTH", 40)
    config = QuantizeConfig(**{"samples": 8, "seq_len": 32, **options})
    return Path(quantizing.quantize(str(source), config, output=output, device="cpu").checkpoint)


def our_logits(folder: Path, dtype: torch.dtype = torch.float32, kernel: str = "reference") -> torch.Tensor:
    """Logits [T, V] of a checkpoint as `quasar generate --no-target` runs it."""
    verifier = load_verifier_alone(VerifierCheckpoint(folder), CPU, dtype, kernel)
    return verifier.forward(PROMPT, verifier.new_cache(len(PROMPT)))


def logits_of(model: Any) -> torch.Tensor:
    """Logits [T, V] of a transformers model."""
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits[0].float()


def quantize_with_gptqmodel(source: Path, folder: Path, options: dict[str, Any]) -> Any:
    """Their checkpoint of a folder, written by them; returns the model as they load it again, in float16."""
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel import QuantizeConfig as TheirConfig

    rows = torch.randint(3, VOCABULARY, (16, 48), generator=torch.Generator().manual_seed(0))
    samples = [{"input_ids": [row], "attention_mask": [[1] * len(row)]} for row in rows.tolist()]
    config = TheirConfig(bits=4, group_size=32, offload_to_disk=False, **options)
    model = GPTQModel.load(str(source), config, device="cpu")
    model.quantize(samples, batch_size=1)
    model.save(str(folder))
    return GPTQModel.load(str(folder), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16).model


def logits_by_optimum(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits [T, V] through transformers, optimum and one of GPTQModel's kernels."""
    from transformers import GPTQConfig

    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        device_map="cpu",
        quantization_config=GPTQConfig(bits=section["bits"], backend="gptq_torch"),
    )
    assert any(hasattr(module, "qweight") for module in model.modules())
    return logits_of(model)


def assert_same_logits(theirs: torch.Tensor, ours: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    """To the tolerance of the dtype that both were computed in."""
    share = HALF_TOLERANCE.get(dtype, TOLERANCE)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=share * ours.abs().max().item())
