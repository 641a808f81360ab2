"""Tiny random models of families that run through transformers, with a byte-level tokenizer each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from helpers.tiny_model import save_tiny_model

BLOCKS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64}
TEXT = {"vocab_size": 264, "eos_token_id": 0, "bos_token_id": None}
SIZES: dict[str, Any] = {
    **TEXT,
    **BLOCKS,
    "intermediate_size": 64,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
OLD_SIZES: dict[str, Any] = {**TEXT, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 2}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,  # as many as the text has
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
LINEAR = {f"linear_{name}_head_dim": 16 for name in ("key", "value")} | {
    f"linear_num_{name}_heads": 2 for name in ("key", "value")
}


CONFIGS = {"Qwen3_5": "Qwen3_5Text", "Qwen3_5Moe": "Qwen3_5MoeText"}  # where a config is not named as its model


def make(name: str, **options: Any) -> Any:
    """The model of a family's class, with these options of its config."""
    config = getattr(transformers, f"{CONFIGS.get(name, name)}Config")(**options)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**OLD_SIZES))


def gemma3_with_vision() -> Any:
    config = transformers.Gemma3Config(
        text_config={**SIZES, "head_dim": 32, "model_type": "gemma3_text"},
        vision_config=VISION,
        mm_tokens_per_image=4,
        boi_token_index=250,
        eoi_token_index=251,
        image_token_index=252,
        eos_token_id=0,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


# By position or in a tuple, with biases of their own or a tower beside them: all of them can be quantized.
QUANTIZED: dict[str, Callable[[], Any]] = {
    "falcon": lambda: make("Falcon", **TEXT, **BLOCKS),
    "falcon, new": lambda: make("Falcon", **TEXT, **BLOCKS, new_decoder_architecture=True, num_kv_heads=1),
    "mpt": lambda: make("Mpt", d_model=64, n_heads=2, n_layers=2, max_seq_len=128, vocab_size=264, eos_token_id=0),
    "bloom": lambda: make("Bloom", hidden_size=64, n_layer=2, n_head=2, **TEXT),
    "starcoder": lambda: make("GPTBigCode", **OLD_SIZES),
    "starcoder2": lambda: make("Starcoder2", **SIZES),
    "gptj": lambda: make("GPTJ", rotary_dim=16, **OLD_SIZES),
    "gptneox": lambda: make("GPTNeoX", **TEXT, **BLOCKS, intermediate_size=64, max_position_embeddings=128),
    "opt": lambda: make("OPT", **TEXT, **BLOCKS, ffn_dim=64, word_embed_proj_dim=64, max_position_embeddings=128),
    "phi": lambda: make("Phi", **TEXT, **BLOCKS, intermediate_size=64, max_position_embeddings=128),
    "gemma3, vision": gemma3_with_vision,
    "lfm2": lambda: make("Lfm2", **SIZES, layer_types=["conv", "full_attention"]),
    "lfm2, dynamic": lambda: make(
        "Lfm2",
        **{**SIZES, "max_position_embeddings": 64},
        layer_types=["conv", "full_attention"],
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    ),
    "qwen3.5": lambda: make(
        "Qwen3_5", **SIZES, **LINEAR, head_dim=32, layer_types=["linear_attention", "full_attention"]
    ),
    "qwen3.5 moe": lambda: make(
        "Qwen3_5Moe",
        **SIZES,
        **LINEAR,
        head_dim=32,
        layer_types=["linear_attention", "full_attention"],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
    ),
    "granite 4": lambda: make(
        "GraniteMoeHybrid",
        **SIZES,
        shared_intermediate_size=64,
        num_local_experts=0,
        mamba_n_heads=8,
        mamba_d_state=16,
        mamba_chunk_size=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    "lfm2 moe": lambda: make(
        "Lfm2Moe",
        **{**SIZES, "num_hidden_layers": 3},
        layer_types=["conv", "full_attention", "conv"],
        num_dense_layers=1,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    ),
    "granite 4, experts": lambda: make(
        "GraniteMoeHybrid",
        **{**SIZES, "intermediate_size": 32},
        shared_intermediate_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        mamba_n_heads=8,
        mamba_d_state=16,
        mamba_chunk_size=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    "granite moe shared": lambda: make(
        "GraniteMoeShared",
        **{**SIZES, "intermediate_size": 32},
        shared_intermediate_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
}
# Without linear layers in their blocks, or with positions that their class counts from elsewhere than `generate`.
UNUSUAL: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2,
    "roberta": lambda: make(
        "Roberta", **TEXT, **BLOCKS, pad_token_id=1, intermediate_size=64, max_position_embeddings=128, is_decoder=True
    ),
}
RECURRENT: dict[str, Callable[[], Any]] = {
    "falcon-h1": lambda: make(
        "FalconH1", **SIZES, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1
    ),
    "mamba": lambda: make("Mamba", vocab_size=264, hidden_size=64, num_hidden_layers=2, eos_token_id=0),
    "bamba": lambda: make(
        "Bamba", **SIZES, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_chunk_size=8
    ),
    "recurrent gemma": lambda: make(
        "RecurrentGemma", **TEXT, **{**BLOCKS, "num_hidden_layers": 3}, intermediate_size=64, attention_window_size=8
    ),
}


def save_family(folder: Path, build: Callable[[], Any]) -> Any:
    """The model in a folder, its matrices drawn wide so that the best two logits are far apart; the model."""
    save_tiny_model(folder)
    torch.manual_seed(1)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    return model


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """What transformers' own greedy `generate` writes after the prompt."""
    prompt = torch.tensor([ids])
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return list(output[0, len(ids) :].tolist())
