"""Our GPTQ checkpoints in a real vLLM: its CPU build, in an environment of its own, which `make interop` makes.

QUASAR_REAL_MODELS names a folder of real models: then smollm2 in it stands for the model of 576 inputs.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_model import save_tiny_model
from interop.interop_cases import CPU, DEMO, missing, quantize
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.models.describe import describe
from quasar_core.models.weights.lean_weights import load_verifier_alone

pytestmark = [
    pytest.mark.interop,
    missing("vllm"),
    pytest.mark.skipif(not (DEMO / "model.safetensors").exists(), reason="the demo model is not in this checkout"),
]
SECONDS = 900  # to start, to compile its kernels and to run, on two busy cores
NEW_TOKENS = 24
PROMPTS = [
    "def count_lines(path):\n    with open(path) as file:\n        return",
    "The capital of France is Paris, and the capital of Italy is",
    "1 2 3 4 5 6 7 8 9 10 11 12",
]
# Nats. vLLM computes in float16, ours here in float32; where that is no more than this, or than twice what float16
# changes in our own passes, the two agree.
TOLERANCE = 0.05
LIKELY = -5.0  # log probability of tokens that may be among the two best
FUSED_RULES = ("qkv_proj$", "gate_up_proj$")
REAL = os.environ.get("QUASAR_REAL_MODELS")


@dataclass
class Answer:
    """What vLLM wrote, and the log probabilities of the two likeliest tokens at each place."""

    tokens: list[int]
    logprobs: list[dict[int, float]]


def prompt_ids(folder: Path) -> list[list[int]]:
    """The prompts as the checkpoint's tokenizer reads them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.encode(text, add_special_tokens=False) for text in PROMPTS]


def run_vllm(folder: Path) -> subprocess.CompletedProcess[str]:
    """vLLM's greedy text, or its error."""
    request = json.dumps({"prompts": prompt_ids(folder), "new_tokens": NEW_TOKENS})
    script = Path(__file__).parent / "run_vllm.py"
    return subprocess.run(
        [sys.executable, str(script), str(folder)], input=request, capture_output=True, text=True, timeout=SECONDS
    )


def answers_of_vllm(folder: Path) -> list[Answer]:
    """For each prompt."""
    ended = run_vllm(folder)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    return [
        Answer(row["tokens"], [{int(token): value for token, value in step.items()} for step in row["logprobs"]])
        for row in found
    ]


def assert_same_text(folder: Path) -> None:
    """Greedy text of vLLM is ours wherever our two best tokens are further apart than float16 can turn around.

    Ours reads vLLM's text, so that each place is compared after the same tokens; the log probabilities too.
    """
    answers, prompts = answers_of_vllm(folder), prompt_ids(folder)
    ours, halves = (
        [our_logprobs(folder, prompt, answer.tokens, dtype) for prompt, answer in zip(prompts, answers, strict=True)]
        for dtype in (torch.float32, torch.float16)
    )
    noise = max((whole - half)[whole > LIKELY].abs().max().item() for whole, half in zip(ours, halves, strict=True))
    tolerance = max(TOLERANCE, 2 * noise)
    decided = 0
    for rows, answer in zip(ours, answers, strict=True):
        assert len(answer.tokens) == NEW_TOKENS
        for place, token in enumerate(answer.tokens):
            best, second = rows[place].topk(2).values.tolist()
            if best - second > 2 * tolerance:
                decided += 1
                assert int(rows[place].argmax()) == token, f"place {place}"
            for other, value in answer.logprobs[place].items():
                assert abs(rows[place, other].item() - value) < tolerance, f"place {place}, to {tolerance}"
    assert decided > len(PROMPTS) * NEW_TOKENS // 2


def our_logprobs(folder: Path, prompt: list[int], tokens: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Log probabilities [T, V] where each of the tokens was chosen, as `quasar generate --no-target` computes them."""
    verifier = load_verifier_alone(VerifierCheckpoint(folder), CPU, dtype, "reference")
    text = prompt + tokens
    logits = verifier.forward(text, verifier.new_cache(len(text)))[len(prompt) - 1 : -1]
    return logits.float().log_softmax(dim=-1)


def verdict(folder: Path) -> str:
    """What `quasar inspect` says of vLLM's CPU build."""
    return describe(VerifierCheckpoint(folder))["loaders"]["vLLM on a CPU"]


def model_of_576_inputs(folder: Path) -> Path:
    """Two blocks of SmolLM2's sizes, of random weights that make some tokens likely; or SmolLM2 itself."""
    if REAL is not None:
        return Path(REAL) / "smollm2"
    save_tiny_model(folder)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=128,
        initializer_range=0.08,
        eos_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The demo model, or one of 576 inputs."""
    return model_of_576_inputs(tmp_path / "tiny") if request.param == "576" else DEMO


on_demo = pytest.mark.parametrize("source", ["demo"], indirect=True)


@pytest.mark.parametrize("source", ["demo", "576"], indirect=True)
def test_a_verifier_of_the_defaults_writes_the_same_text_there(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_same_text(quantize(monkeypatch, source, tmp_path / "out"))


@on_demo
def test_one_of_widths_by_layer_writes_the_same_text_there(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of groups of 128, 64 and 32 at 4 bits: its CPU build has no others."""
    folder = quantize(monkeypatch, source, tmp_path / "out", mean_bits=4.25, widths=(4,))
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert any("qkv_proj" in name or "gate_up_proj" in name for name in section["dynamic"])
    assert verdict(folder) == "yes"
    assert_same_text(folder)


@on_demo
def test_it_reads_rules_under_the_layers_own_names_wrongly(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same without the rules for fused names, as a checkpoint was written once."""
    folder = quantize(monkeypatch, source, tmp_path / "out", mean_bits=4.25, widths=(4,))
    for name in ("config.json", "quantize_config.json"):
        content = json.loads((folder / name).read_text())
        section = content.get("quantization_config", content)
        rules = section["dynamic"].items()
        section["dynamic"] = {rule: width for rule, width in rules if not rule.endswith(FUSED_RULES)}
        (folder / name).write_text(json.dumps(content))
    assert "its config tells" in verdict(folder)
    assert run_vllm(folder).returncode != 0


@pytest.mark.parametrize(
    ("source", "options"),
    [("576", {"group_size": 128}), ("demo", {"bits": 8}), ("demo", {"bits": 3}), ("demo", {"sym": False})],
    indirect=["source"],
)
def test_what_inspect_says_is_refused_is_refused_there(
    source: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = quantize(monkeypatch, source, tmp_path / "out", **options)
    assert verdict(folder).startswith("no: ")
    assert run_vllm(folder).returncode != 0
