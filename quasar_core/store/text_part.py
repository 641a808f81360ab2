"""The text part of a multimodal model: its options in config.json, and its tensors among those of the towers.

Such a folder has the options of its language model under `text_config`, and the weights under a prefix. Read as a text
model it has them where a text model's folder has them; what belongs to images and sound is left aside. Only classes
are listed whose text passes as it does in the text model alone.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

WRAPPERS = frozenset(
    (
        "Gemma3ForConditionalGeneration",
        "Gemma4ForConditionalGeneration",
        "InternVLForConditionalGeneration",
        "LlavaForConditionalGeneration",
        "Mistral3ForConditionalGeneration",
        "MuseGlimmerForConditionalGeneration",
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MoeForConditionalGeneration",
    )
)
# The class of the text part, by its model_type.
CLASSES = {
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
    "llama": "LlamaForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "muse_glimmer_text": "MuseGlimmerForCausalLM",  # which transformers has not: `models/hf/muse_glimmer.py`
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
}
# Sizes of the text part by its model_type, where config.json leaves them out, as transformers has them.
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
USUAL_SIZES = {
    "gemma3_text": (262_208, 2304, 9216, 26, 8, 131_072),
    "gemma4_text": (262_144, 2304, 9216, 30, 8, 131_072),
    "llama": (32_000, 4096, 11_008, 32, 32, 2048),
    "ministral3": (131_072, 4096, 14_336, 34, 32, 262_144),
    "mistral": (32_000, 4096, 14_336, 32, 32, 131_072),
    "muse_glimmer_text": (202_048, 6656, 19_968, 52, 32, 131_072),
    "qwen2": (151_936, 4096, 22_016, 32, 32, 32_768),
    "qwen3": (151_936, 4096, 22_016, 32, 32, 32_768),
    "qwen3_5_text": (248_320, 4096, 12_288, 32, 16, 32_768),
}
UNTIED = ("muse_glimmer_text",)  # whose wrapper has no such option, unless config.json does
# How the files name what a text model's files name so: as transformers 5 does, then as earlier versions did.
PREFIXES = (
    {"model.": "model.language_model.", "lm_head.": "lm_head."},
    {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
)
BESIDE = ("mtp.",)  # heads that predict further tokens: no tower's
SHARED = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config", "transformers_version")


def has_text_part(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a multimodal model whose text part is known."""
    text = config.get("text_config") or {}
    named = config.get("architectures") or [""]
    return named[0] in WRAPPERS and text.get("model_type") in CLASSES


def text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json that the text part would have as a model of its own; that of a text model as it is."""
    if not has_text_part(config):
        return dict(config)
    text = config["text_config"]
    shared = {name: config[name] for name in SHARED if config.get(name) is not None}
    # transformers ties by default, and unties where the files hold a head that differs.
    is_tied = text["model_type"] not in UNTIED
    usual = {"tie_word_embeddings": is_tied, **dict(zip(SIZES, USUAL_SIZES.get(text["model_type"], ()), strict=False))}
    return {**usual, **text, **shared, "architectures": [CLASSES[text["model_type"]]]}


def prefixes_of(stored: Iterable[str]) -> Mapping[str, str]:
    """The prefixes in files with tensors of these names, by those of a text model."""
    older = any(name.startswith(PREFIXES[1]["model."]) for name in stored)
    return PREFIXES[int(older)]


def key_mapping() -> dict[str, str]:
    """The prefixes as transformers' loading takes them: patterns of names in files, and what replaces them."""
    changed = [(own, other) for names in PREFIXES for own, other in names.items() if own != other]
    return {f"^{re.escape(other)}": own for own, other in changed}


def text_name(stored: str) -> str | None:
    """The name that a tensor of a multimodal model would have in the text model; None for those of its towers."""
    if stored.startswith(BESIDE):
        return stored
    for names in PREFIXES:
        for own, prefix in names.items():
            if stored.startswith(prefix):
                return own + stored.removeprefix(prefix)
    return None
