"""Text parts that transformers has within a multimodal class alone, made known to its `AutoModelForCausalLM`."""

from functools import cache

from transformers import AutoModelForCausalLM


@cache
def register_muse_glimmer() -> None:
    """Have transformers build and load Muse Glimmer's text part, where its version has that."""
    from transformers import MuseGlimmerTextConfig

    from quasar_core.models.hf.muse_glimmer import MuseGlimmerForCausalLM

    AutoModelForCausalLM.register(MuseGlimmerTextConfig, MuseGlimmerForCausalLM, exist_ok=True)
