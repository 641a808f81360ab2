"""Our checkpoints of every architecture of the lean decoder in vLLM's CPU build, as `inspect` says which it loads."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import CASES, MIXTURES, SIZES, YARN, save_model
from helpers.tiny_model import save_tiny_model
from interop.interop_cases import CPU, PROMPT, VOCABULARY, missing, quantize

from quasar_core.api.exporting import export
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.models.describe import describe
from quasar_core.models.weights.lean_weights import load_verifier_alone

pytestmark = [pytest.mark.interop, missing("vllm")]
FIRST = {family: case for case, (family, _) in reversed(CASES.items())}  # of each family's cases
FIRST["Gemma4 with experts"] = "gemma 4, experts"
FIRST["GraniteMoeHybrid with experts"] = "granite 4, experts"
NEW_TOKENS = 6
ASK_FOR_TORCHVISION = {"MuseGlimmer", "Qwen3_5", "Qwen3_5Moe"}  # their classes see pictures too
# Of the largest logit. It refuses float16 for some families.
TOLERANCE = {"float16": 0.02, "bfloat16": 0.06}
NO_FLOAT16 = {"Gemma2", "Gemma3", "Glm4", "Qwen3_5", "Qwen3_5Moe"}
TOKENS = 0.9  # share of them that must agree
DELTA_HEADS = {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
OTHERS: dict[str, dict[str, Any]] = {
    # Its rule takes heads whose keys and values are of one size.
    "Qwen3_5": DELTA_HEADS,
    "Qwen3_5Moe": DELTA_HEADS,
    # Its kernel takes outputs that are a multiple of 32, and there is one for each of Mamba's heads among them.
    "GraniteMoeHybrid": {"mamba_n_heads": 32, "mamba_d_head": 4},
    "GraniteMoeHybrid with experts": {"mamba_n_heads": 32, "mamba_d_head": 4},
    # It reads options that transformers' own config does without.
    "Lfm2": {"conv_dim": 128, "conv_dim_out": 128, "block_dim": 128},
    # Queries do not grow with the position there.
    "Ministral3": {"rope_parameters": {**YARN, "original_max_position_embeddings": 128, "llama_4_scaling_beta": 0.4}},
}


LLAMAS_OWN = ("rope_parameters", "head_dim", "attention_bias", "mlp_bias")
PANGU = """
from transformers import PretrainedConfig


class PanguEmbeddedConfig(PretrainedConfig):
    model_type = "PanguEmbedded"
"""


class Forks:
    """A process that has vLLM imported, and forks one for each checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tests = Path(__file__).parents[1]
        self.process = subprocess.Popen(
            [sys.executable, str(tests / "interop" / "run_vllm_forks.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "log").open("w"),
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])},
        )

    def answer(self, checkpoint: Path, dtype: str) -> dict[str, Any] | None:
        """Tokens and log probabilities; None where vLLM does not load or run it."""
        answer = self.folder / "answer.json"
        answer.unlink(missing_ok=True)
        own_code = any(checkpoint.glob("*.py"))
        request = {"folder": str(checkpoint), "dtype": dtype, "own_code": own_code, "answer": str(answer)}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({**request, "prompt": PROMPT, "new_tokens": NEW_TOKENS}), file=self.process.stdin, flush=True)
        status = self.process.stdout.readline()
        assert status, (self.folder / "log").read_text()[-3000:]
        return json.loads(answer.read_text()) if int(status) == 0 else None


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    found = Forks(tmp_path_factory.mktemp("vllm"))
    yield found
    found.process.communicate()


def twice_as_wide(options: dict[str, Any]) -> dict[str, Any]:
    """The sizes of a case doubled: heads of 32 channels and more, and layers of a multiple of 32."""
    kept = ("vocab_size", "vocab_size_per_layer_input", "mamba_chunk_size")
    return {
        name: 2 * value if name.endswith(("_size", "head_dim", "d_head")) and name not in kept else value
        for name, value in options.items()
    }


def our_logprobs(folder: Path, tokens: list[int]) -> torch.Tensor:
    """Log probabilities [T, V] behind each token of the prompt and of the text but the last, in float32."""
    verifier = load_verifier_alone(VerifierCheckpoint(folder), CPU, torch.float32, "reference")
    text = PROMPT + tokens
    return verifier.forward(text, verifier.new_cache(len(text)))[:-1].log_softmax(dim=-1)


def are_ours(answer: dict[str, Any] | None, folder: Path, tolerance: float) -> bool:
    """Whether vLLM gives our log probabilities, for nearly all tokens of the prompt and for all new ones."""
    if answer is None:
        return False
    ours = our_logprobs(folder, answer["tokens"])
    scale = (ours - ours.mean(dim=-1, keepdim=True)).abs().max()
    same = (torch.tensor(answer["logprobs"]) - ours).abs().amax(dim=-1) / scale < tolerance
    return same[-NEW_TOKENS:].all().item() and same.float().mean().item() >= TOKENS


@pytest.mark.parametrize("family", sorted(FIRST))
def test_vllm_loads_what_inspect_says(
    family: str, forks: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family in ASK_FOR_TORCHVISION:
        pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
    if (family in MIXTURES or "experts" in family) and torch.cpu._is_amx_tile_supported():
        pytest.skip("there may be a kernel for experts' codes on AMX, which was not tried")
    source = tmp_path / "tiny"
    save_tiny_model(source)
    name, options = CASES[FIRST[family]]
    save_model(source, name, twice_as_wide({**SIZES, **options, **OTHERS.get(family, {}), "vocab_size": VOCABULARY}))
    folder = quantize(monkeypatch, source, group_size=32)
    says = describe(VerifierCheckpoint(folder))["loaders"]["vLLM on a CPU"]
    dtype = "bfloat16" if family in NO_FLOAT16 else "float16"
    assert are_ours(forks.answer(folder, dtype), folder, TOLERANCE[dtype]) == (says == "yes"), says


def test_without_the_list_of_layers_it_reads_no_codes_of_gate_and_up_in_one(
    forks: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a checkpoint of GLM-4 was written once."""
    source = tmp_path / "tiny"
    save_tiny_model(source)
    name, options = CASES["glm 4"]
    save_model(source, name, twice_as_wide({**SIZES, **options, "vocab_size": VOCABULARY}))
    folder = quantize(monkeypatch, source, group_size=32)
    for file in (folder / "config.json", folder / "quantize_config.json"):
        content = json.loads(file.read_text())
        content.get("quantization_config", content).pop("modules_in_block_to_quantize")
        file.write_text(json.dumps(content))
    assert "does not list it" in describe(VerifierCheckpoint(folder))["loaders"]["vLLM on a CPU"]
    assert forks.answer(folder, "bfloat16") is None


def test_openpangu_loads_beside_its_configs_own_code(
    forks: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers has no class of it, so that its repositories bring the config's."""
    source = tmp_path / "tiny"
    save_tiny_model(source)
    save_model(source, "Llama", twice_as_wide({**SIZES, "attention_bias": True, "vocab_size": VOCABULARY}))
    config = json.loads((source / "config.json").read_text())
    kept = {name: config[name] for name in config if name not in LLAMAS_OWN}
    named = {"architectures": ["PanguEmbeddedForCausalLM"], "model_type": "PanguEmbedded", "bias": True}
    (source / "config.json").write_text(json.dumps({**kept, **named, "rope_theta": 10_000.0}))
    folder = quantize(monkeypatch, source, group_size=32)
    (folder / "configuration_pangu.py").write_text(PANGU)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_pangu.PanguEmbeddedConfig"}
    assert describe(VerifierCheckpoint(folder))["loaders"]["vLLM on a CPU"] == "yes"
    (folder / "config.json").write_text(json.dumps(config))
    assert are_ours(forks.answer(folder, "float16"), folder, TOLERANCE["float16"])


@pytest.mark.parametrize("family", ["Glm4", "Phi3"])
def test_what_is_exported_for_gptqmodel_loads_where_inspect_says_so(
    family: str, forks: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gate and up as two layers, of which vLLM makes one; Phi's it finds since the config lists them as one too."""
    source = tmp_path / "tiny"
    save_tiny_model(source)
    name, options = CASES[FIRST[family]]
    save_model(source, name, twice_as_wide({**SIZES, **options, "vocab_size": VOCABULARY}))
    folder = Path(export(str(quantize(monkeypatch, source, group_size=32)))["checkpoint"])
    assert describe(VerifierCheckpoint(folder))["loaders"]["vLLM on a CPU"] == "yes"
    dtype = "bfloat16" if family in NO_FLOAT16 else "float16"
    assert are_ours(forks.answer(folder, dtype), folder, TOLERANCE[dtype])
