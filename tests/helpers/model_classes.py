"""Config and model classes by the names that cases have."""

from typing import Any

import transformers

# Classes whose names do not come of that of their model.
CLASSES = {
    "Qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM"),
    "Qwen3_5Moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM"),
    "Gemma4": ("Gemma4TextConfig", "Gemma4ForCausalLM"),
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
}


def classes_of(name: str) -> tuple[Any, Any]:
    """Config and model of a name of CASES."""
    config, model = CLASSES.get(name, (f"{name}Config", f"{name}ForCausalLM"))
    if name == "MuseGlimmer":  # transformers has its multimodal class alone, to which `test_text_part.py` holds it
        return transformers.MuseGlimmerTextConfig, muse_glimmer_class()
    return getattr(transformers, config), getattr(transformers, model)


def muse_glimmer_class() -> Any:
    """Muse Glimmer's text part, made known to transformers as well; imported where it is wanted, as it is recent."""
    from quasar_core.models.hf.muse_glimmer import MuseGlimmerForCausalLM, register

    register()
    return MuseGlimmerForCausalLM
