"""Helpers of the tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers.tiny_model import save_tiny_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "num_experts_per_tok": 2,
    "eos_token_id": 0,
    "bos_token_id": None,
}


def qwen3_moe() -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=32, norm_topk_prob=True))


def save(folder: Path, make: Callable[[], Any]) -> Path:
    """The model with a byte-level tokenizer."""
    save_tiny_model(folder)
    torch.manual_seed(1)
    make().to(torch.bfloat16).save_pretrained(folder)
    return folder
