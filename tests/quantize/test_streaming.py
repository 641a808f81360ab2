"""Models had part by part against the same models loaded whole by transformers, and experts taken apart."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.streaming_models import EXPERTS, SIZES, SLIDING
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from quasar_core.errors import QuasarError
from quasar_core.models.hf.experts import SeparateExperts, module_name
from quasar_core.models.weights.lean_weights import load_target
from quasar_core.quantize.blocks.streaming import StreamedModel, open_target
from quasar_core.quantize.measure_fidelity import read_rows

CPU = torch.device("cpu")
IDS = torch.randint(97, (3, 20), generator=torch.Generator().manual_seed(1))
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3, tied": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": True, "head_dim": 16}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"head_dim": 16, **SLIDING}),
    "qwen3-moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {"head_dim": 16, **EXPERTS}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def save(folder: Path, name: str) -> PreTrainedModel:
    """A random model of that kind, loaded again by transformers."""
    config, model, options = MODELS[name]
    torch.manual_seed(0)
    model(config(**{**SIZES, **options})).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_model_is_what_transformers_loads(name: str, tmp_path: Path) -> None:
    expected = logits(save(tmp_path, name))
    target = open_target(tmp_path, CPU, torch.float32)
    assert target.whole_because is None
    assert all(parameter.is_meta for parameter in target.skeleton.parameters())
    torch.testing.assert_close(logits(target.whole()), expected, rtol=1e-4, atol=1e-4)  # mapped: aligned otherwise
    assert all(parameter.is_meta for parameter in target.skeleton.parameters()), "the skeleton stays empty"


@pytest.mark.parametrize("name", MODELS)
def test_rows_that_go_through_it_block_by_block(name: str, tmp_path: Path) -> None:
    expected = logits(save(tmp_path, name))
    target = open_target(tmp_path, CPU, torch.float32)
    rows = read_rows(target, [IDS[:, :12], IDS], "reading")
    for row, whole in zip(IDS.tolist(), expected, strict=True):
        found = rows.forward(row, rows.new_cache(20))
        assert torch.allclose(found, whole, atol=1e-4)
        assert torch.allclose(rows.forward(row[:12], rows.new_cache(20)), whole[:12], atol=1e-4)
        assert torch.allclose(rows.forward(row, rows.new_cache(20), last_only=True), found[-1:], atol=1e-4)
        pieces = list(rows.pieces(row, 2, 7))
        assert max(len(piece) for piece in pieces) == 7
        assert torch.allclose(torch.cat(pieces), found[2:], atol=1e-4)


def test_weights_on_the_cpu_stay_in_their_files(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    block = open_target(tmp_path, CPU, torch.float32).block(0)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc here to tell mapped memory by")
    address = block.mlp.up_proj.weight.data_ptr()  # type: ignore[union-attr]
    for line in maps.read_text().splitlines():
        begin, end = (int(number, 16) for number in line.split()[0].split("-"))
        if begin <= address < end:
            assert line.endswith("model.safetensors")
            return
    pytest.fail("the weight lies nowhere")


def test_openpangu_is_built_as_llama_is(tmp_path: Path) -> None:
    """Its files against the lean decoder, which reads them as they are; transformers does not know it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True))
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    config = {key: value for key, value in model.config.to_dict().items() if key in SIZES}
    config |= {"architectures": ["PanguEmbeddedForCausalLM"], "model_type": "PanguEmbedded", "bias": True}
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6, "rope_theta": 1e4}))
    lean = load_target(tmp_path, CPU, torch.float32)
    found = logits(open_target(tmp_path, CPU, torch.float32).whole())[0]
    assert torch.allclose(lean.forward(IDS[0].tolist(), lean.new_cache(32)), found, atol=1e-4)


def test_files_without_the_base_models_prefix_are_read_by_their_own_names(tmp_path: Path) -> None:
    """Older GPT-2 files have no `transformer.` in front, which transformers sees to while it loads."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=97, n_positions=64)).eval()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    target = open_target(tmp_path, CPU, torch.float32)
    assert target.whole_because is None
    torch.testing.assert_close(logits(target.whole()), logits(model), rtol=1e-4, atol=1e-4)


def test_a_config_that_is_none(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such model"}))
    with pytest.raises(QuasarError, match="does not know the model type no such model"):
        open_target(tmp_path, CPU, torch.float32)


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_every_expert_has_layers_of_its_own(name: str, tmp_path: Path) -> None:
    save(tmp_path, name)
    target: StreamedModel = open_target(tmp_path, CPU, torch.float32)
    block: Any = target.block(1)
    assert isinstance(block.mlp.experts, SeparateExperts)
    inputs = [module.in_features for module in block.mlp.experts[3].children()]
    assert inputs == [32, 32, 64 if name == "mixtral" else 32]


def test_names_in_the_files_of_mixtral_and_lfm2() -> None:
    name = "model.layers.0.mlp.experts.11.up_proj.weight"
    assert module_name("model.layers.0.block_sparse_moe.experts.11.w3.weight") == name
    assert module_name("model.layers.0.block_sparse_moe.gate.weight") == "model.layers.0.mlp.gate.weight"
    assert module_name(name) == name
    name = "model.layers.2.feed_forward.experts.11.down_proj.weight"
    assert module_name("model.layers.2.feed_forward.experts.11.w2.weight") == name
    assert module_name("model.layers.0.feed_forward.w2.weight") == "model.layers.0.feed_forward.w2.weight"
