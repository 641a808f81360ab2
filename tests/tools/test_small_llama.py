"""The second small model: its shape, what trains it, and that its folder loads."""

from pathlib import Path

import torch
from helpers.tiny_model import save_tiny_model
from transformers import AutoTokenizer, LlamaForCausalLM

from tools.demo.small_llama import CONFIG, llama_config
from tools.demo.train import make_optimizers, save_model


def test_a_million_parameters_and_a_head_of_its_own() -> None:
    model = LlamaForCausalLM(llama_config(CONFIG.vocab_size))
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_049_728
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert all(size % 128 == 0 for layer in model.model.layers for size in layer.mlp.down_proj.weight.shape)


def test_the_head_is_trained_as_the_embedding_is() -> None:
    model = LlamaForCausalLM(llama_config(CONFIG.vocab_size))
    muon, adam = make_optimizers(model, CONFIG)
    counted = [sum(p.numel() for group in each.param_groups for p in group["params"]) for each in (muon, adam)]
    assert sum(counted) == 1_049_728
    assert counted[1] == 2 * 1024 * 128 + 9 * 128  # embedding, head, norms


def test_a_model_is_saved_with_its_texts(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(tmp_path / "tiny"))
    tokenizer.pad_token = tokenizer.eos_token
    model = LlamaForCausalLM(llama_config(384)).to(torch.bfloat16)
    save_model(model, tokenizer, tmp_path / "saved", {"training.json": "{}\n"})
    assert (tmp_path / "saved" / "training.json").read_text() == "{}\n"
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved", "tiny"]
