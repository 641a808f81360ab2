"""Muse Glimmer's text part as a model of its own passes text as transformers' multimodal class does."""

from pathlib import Path

import pytest
import torch
from helpers.decoder_cases import CPU, FLOAT, fresh_logits, random_tokens
from helpers.multimodal_models import save_multimodal

from quasar_core.models.hf.causal_lm import load_target
from quasar_core.models.hf.muse_glimmer import MuseGlimmerForCausalLM


@pytest.mark.parametrize("tied", [False, True])
def test_its_logits_are_those_of_the_multimodal_model(tied: bool, tmp_path: Path) -> None:
    model = save_multimodal(tmp_path, "muse glimmer", tie_word_embeddings=tied)
    loaded = load_target(tmp_path, CPU, FLOAT)
    assert isinstance(loaded.model, MuseGlimmerForCausalLM)
    assert (loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight) == tied
    tokens = random_tokens()
    expected = fresh_logits(model, tokens)
    assert torch.equal(fresh_logits(loaded.model, tokens), expected)
    cache = loaded.new_cache(64)
    torch.testing.assert_close(loaded.forward(tokens, cache, last_only=True), expected[-1:])
