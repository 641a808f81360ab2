"""A LoRA merged into its model: the sum of its definition, in a folder of its own; whatever does not fit is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import CPU, FLOAT, fresh_logits, in_passes, random_tokens, save_model
from helpers.multimodal_models import save_multimodal
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from quasar_cli.main import app
from quasar_core.checkpoint.adapter import merge_adapter
from quasar_core.errors import QuasarError, UsageError
from quasar_core.models.weights.lean_weights import load_target
from quasar_core.store.fingerprint import fingerprint

MODULES = {"model.layers.0.self_attn.q_proj": (64, 64), "model.layers.3.mlp.down_proj": (64, 96)}


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("QUASAR_HOME", str(tmp_path / "home"))
    return iter(())


def write(folder: Path, rank: int = 4, **options: Any) -> dict[str, torch.Tensor]:
    """An adapter of two layers, and its tensors."""
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj"], **options}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors: dict[str, torch.Tensor] = {}
    for name, (outputs, inputs) in MODULES.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, inputs)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(outputs, rank)
    save_file(tensors, folder / "adapter_model.safetensors")
    return tensors


@pytest.mark.parametrize(("options", "scale"), [({}, 2.0), ({"use_rslora": True}, 4.0), ({"lora_alpha": 1}, 0.25)])
def test_the_merged_model_adds_the_product_of_both_matrices(
    tmp_path: Path, options: dict[str, Any], scale: float
) -> None:
    model = save_model(tmp_path / "base", "Llama", {})
    tensors = write(tmp_path / "lora", **options)
    folder = merge_adapter(tmp_path / "base", tmp_path / "lora")
    for name in MODULES:
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        model.get_submodule(name).weight.data += scale * (b @ a)
    logits = in_passes(load_target(folder, CPU, FLOAT), random_tokens(), [20, 1, 4])
    expected = fresh_logits(model, random_tokens())
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert fingerprint(folder) != fingerprint(tmp_path / "base")


def test_files_stay_apart_and_a_merge_is_made_once(tmp_path: Path) -> None:
    save_model(tmp_path / "base", "Llama", {})
    LlamaForCausalLM.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "base", max_shard_size="100KB")
    (tmp_path / "base" / "model.safetensors").unlink(missing_ok=True)
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"old")
    write(tmp_path / "lora")
    folder = merge_adapter(tmp_path / "base", tmp_path / "lora")
    names = {path.name for path in (tmp_path / "base").iterdir()} - {"pytorch_model.bin"}
    assert {path.name for path in folder.iterdir()} == names
    assert len(names) > 3
    changed = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert merge_adapter(tmp_path / "base", tmp_path / "lora") == folder
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == changed
    write(tmp_path / "lora")
    assert merge_adapter(tmp_path / "base", tmp_path / "lora") != folder


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"peft_type": "IA3"}, "is no plain LoRA: its peft_type is IA3"),
        ({"use_dora": True}, "is no plain LoRA: its use_dora is True"),
        ({"modules_to_save": ["lm_head"]}, r"is no plain LoRA: its modules_to_save is \['lm_head'\]"),
        ({"rank_pattern": {"q_proj": 8}}, "its ranks or alphas differ by layer"),
        ({"lora_alpha": None}, "adapter_config.json and the matrices of .* disagree"),
        ({"init_lora_weights": "pissa_niter_4"}, "is no plain LoRA: its init_lora_weights is pissa_niter_4"),
        ({"alora_invocation_tokens": [5]}, r"is no plain LoRA: its alora_invocation_tokens is \[5\]"),
        ({"an_option_to_come": {"a": 1}}, "is no plain LoRA: its an_option_to_come is"),
    ],
)
def test_what_is_no_plain_lora_is_refused(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    save_model(tmp_path / "base", "Llama", {})
    write(tmp_path / "lora", **options)
    with pytest.raises(QuasarError, match=sentence):
        merge_adapter(tmp_path / "base", tmp_path / "lora")
    assert not (tmp_path / "home").exists()


AS_PEFT_WRITES = {  # what of it may change the sum is off
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "corda_config", "eva_config", "megatron_config")),
    **dict.fromkeys(("layer_replication", "layers_pattern", "modules_to_save", "target_parameters", "revision")),
    **dict.fromkeys(("ensure_weight_tying", "fan_in_fan_out", "lora_bias", "use_dora", "use_qalora"), False),
    "alpha_pattern": {},
    "rank_pattern": {},
    "loftq_config": {},
    "init_lora_weights": True,
    "inference_mode": True,
    "auto_mapping": {"parent_library": "a"},
    "lora_dropout": 0.05,
    "peft_version": "0.18.0",
    "task_type": "CAUSAL_LM",
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "base_model_name_or_path": "a/b",
}


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "model."])
@pytest.mark.parametrize("name", ["qwen3.5", "ministral 3"])
def test_every_matrix_is_merged_into_a_multimodal_folders_text_part(tmp_path: Path, name: str, prefix: str) -> None:
    """By all the names that versions of transformers give its layers."""
    model = save_multimodal(tmp_path / "base", name)
    module, rank = "layers.1.mlp.down_proj", 4
    a, b = torch.randn(rank, 64), torch.randn(64, rank)
    write(tmp_path / "lora", **AS_PEFT_WRITES)
    whole = {f"base_model.model.{prefix}{module}.lora_{part}.weight": m for part, m in (("A", a), ("B", b))}
    save_file(whole, tmp_path / "lora" / "adapter_model.safetensors")
    folder = merge_adapter(tmp_path / "base", tmp_path / "lora")
    before, after = (load_file(place / "model.safetensors") for place in (tmp_path / "base", folder))
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert [key.endswith(f"{module}.weight") for key in changed] == [True]
    model.get_submodule(f"model.language_model.{module}").weight.data += 2.0 * (b @ a)
    logits = in_passes(load_target(folder, CPU, FLOAT), random_tokens(), [20, 1, 4])
    torch.testing.assert_close(logits, fresh_logits(model, random_tokens()), atol=1e-4, rtol=1e-4)


def test_a_towers_matrices_are_merged_too_and_one_weight_is_changed_once(tmp_path: Path) -> None:
    save_multimodal(tmp_path / "base", "ministral 3")
    before = load_file(tmp_path / "base" / "model.safetensors")
    tower = next(key for key in before if key.startswith("vision_tower.") and key.endswith("q_proj.weight"))
    outputs, inputs = before[tower].shape
    write(tmp_path / "lora")

    def of(module: str, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
        a, b = torch.randn(4, inputs), torch.randn(outputs, 4)
        return {f"base_model.model.{module}.lora_{part}.weight": m for part, m in (("A", a), ("B", b))}

    save_file(of(tower.removesuffix(".weight"), outputs, inputs), tmp_path / "lora" / "adapter_model.safetensors")
    after = load_file(merge_adapter(tmp_path / "base", tmp_path / "lora") / "model.safetensors")
    assert [key for key in before if not torch.equal(before[key], after[key])] == [tower]
    twice = [of(f"{prefix}layers.0.mlp.up_proj", 64, 64) for prefix in ("model.language_model.", "model.")]
    save_file(twice[0] | twice[1], tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(QuasarError, match=r"changes language_model\.model\.layers\.0\.mlp\.up_proj\.weight twice"):
        merge_adapter(tmp_path / "base", tmp_path / "lora")
    save_file(of("model.visual.blocks.9.q_proj", 64, 64), tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(QuasarError, match=r"the model has no model\.visual\.blocks\.9\.q_proj"):
        merge_adapter(tmp_path / "base", tmp_path / "lora")


def test_one_of_another_model_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "small", "Llama", {"num_hidden_layers": 2})
    save_model(tmp_path / "wide", "Llama", {"intermediate_size": 128})
    write(tmp_path / "lora")
    with pytest.raises(QuasarError, match=r"the model has no model\.layers\.3\.mlp\.down_proj"):
        merge_adapter(tmp_path / "small", tmp_path / "lora")
    with pytest.raises(QuasarError, match=r"does not fit this model: for model\.layers\.3\.mlp\.down_proj\.weight"):
        merge_adapter(tmp_path / "wide", tmp_path / "lora")
    with pytest.raises(QuasarError, match="holds no adapter"):
        merge_adapter(tmp_path / "small", tmp_path / "wide")


@pytest.mark.parametrize("extra", ["base_model.model.lm_head.weight", "base_model.model.model.x.lora_magnitude_vector"])
def test_tensors_beside_the_matrices_are_refused(tmp_path: Path, extra: str) -> None:
    save_model(tmp_path / "base", "Llama", {})
    tensors = write(tmp_path / "lora")
    save_file({**tensors, extra: torch.ones(2)}, tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(QuasarError, match=f"is no plain LoRA: it holds {extra}"):
        merge_adapter(tmp_path / "base", tmp_path / "lora")
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    with pytest.raises(QuasarError, match="pickled adapters are never loaded"):
        merge_adapter(tmp_path / "base", tmp_path / "lora")


def test_generate_names_the_model_that_an_adapter_needs(tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["generate", "--prompt", "a", "--adapter", str(tmp_path)])
    assert isinstance(run.exception, UsageError)
    assert "--adapter needs --model MODEL" in str(run.exception)
