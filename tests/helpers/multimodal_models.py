"""Tiny random multimodal models, in folders as transformers' own classes write them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from helpers.tiny_model import save_tiny_model
from safetensors.torch import load_file, save_file

TEXT: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 0,
    "head_dim": 32,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": 28,
}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4} | {
    f"linear_{name}_head_dim": 32 for name in ("key", "value")
}
HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2, **DELTA}
PIXTRAL = {**VISION, "model_type": "pixtral", "head_dim": 16}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "llama_4_scaling_beta": 0.1,
}
GEMMA_4 = {
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 7,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 264,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "use_bidirectional_attention": "vision",
}
# By name: class, options of the text, of the tower, and others.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "qwen3.5": ("Qwen3_5", HYBRID, {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4}, {}),
    "gemma 3": ("Gemma3", {"sliding_window": 7, "query_pre_attn_scalar": 32}, VISION, {}),
    "gemma 4": ("Gemma4", GEMMA_4, {**VISION, "num_key_value_heads": 2, "head_dim": 16}, {"audio_config": None}),
    "mistral small 3.1": ("Mistral3", {"model_type": "mistral"}, PIXTRAL, {}),
    "ministral 3": (
        "Mistral3",
        {"model_type": "ministral3", "rope_parameters": YARN},
        PIXTRAL,
        {"tie_word_embeddings": False},
    ),
    "muse glimmer": (
        "MuseGlimmer",
        {"sliding_window": 7, "output_multiplier": 1.5, "bos_token_id": None},
        {**VISION, "pos_emb_height": 2, "pos_emb_width": 2},
        {"out_hidden_size": 128, "projector_hidden_size": 32},
    ),
    "llava": ("Llava", {"model_type": "llama"}, {**VISION, "model_type": "clip_vision_model"}, {}),
    "internvl": ("InternVL", {"model_type": "qwen2"}, {**VISION, "image_size": [28, 28], "patch_size": [14, 14]}, {}),
}


def save_multimodal(folder: Path, name: str, **options: Any) -> Any:
    """The model in a folder with a byte-level tokenizer, its matrices drawn wide; the transformers model."""
    kind, text, vision, others = MODELS[name]
    others = {**others, **options}
    save_tiny_model(folder)
    torch.manual_seed(1)
    tower = {"intermediate_size": 32, "hidden_size": 32, **vision}
    config = getattr(transformers, f"{kind}Config")(text_config={**TEXT, **text}, vision_config=tower, **others)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.2)
            elif "norm" in key and "language_model" in key:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def add_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """More tensors in the one file of a folder."""
    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path, metadata={"format": "pt"})
