"""Rotary frequencies equal transformers', for each scaling, over long and short texts."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.rope import RopeTables, inverse_frequencies

CPU = torch.device("cpu")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "a large theta": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 512, "rope_theta": 5e5},
    "yarn": YARN,
    "yarn, whole context": {"rope_type": "yarn", "factor": 4.0},
    "yarn, untruncated": {**YARN, "truncate": False, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, attention factor": {**YARN, "attention_factor": 0.7},
    "yarn, mscale": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.5},
    "yarn, factor below one": {**YARN, "factor": 1.0},
}


def both(scaling: dict[str, Any], head_size: int = 64) -> tuple[LlamaRotaryEmbedding, RopeTables]:
    """The same rotary embedding of transformers and of the decoder."""
    config = LlamaConfig(
        hidden_size=4 * head_size,
        num_attention_heads=4,
        max_position_embeddings=1500,
        rope_parameters={"rope_theta": 1e4, **scaling},
    )
    content = {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    return LlamaRotaryEmbedding(config), RopeTables(DecoderConfig.parse(content).ropes[0], CPU, torch.float32)


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize(("start", "end"), [(0, 100), (700, 701), (1400, 1540), (2990, 3000)])
def test_heads_are_rotated_as_transformers_rotates_them(name: str, start: int, end: int) -> None:
    theirs, ours = both(SCALINGS[name])
    x = torch.randn(1, 3, end - start, 64, generator=torch.Generator().manual_seed(0))
    cos, sin = theirs(x, torch.arange(start, end)[None])
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    cos, sin = ours.rows(start, end, prompt_length=end)  # one pass of the whole prompt
    heads = x[0].transpose(0, 1)
    torch.testing.assert_close(
        heads * cos + heads.roll(32, -1) * sin, expected[0].transpose(0, 1), atol=1e-3, rtol=1e-5
    )
    frequencies, magnitude = inverse_frequencies(ours.rope, end)
    torch.testing.assert_close(frequencies, theirs.inv_freq, atol=1e-8, rtol=1e-5)
    assert magnitude == pytest.approx(theirs.attention_scaling)


def test_tables_of_another_dtype_are_rounded_from_float32() -> None:
    _, exact = both({"rope_type": "default"})
    rounded = RopeTables(exact.rope, CPU, torch.bfloat16)
    for ours, theirs in zip(rounded.rows(900, 1200), exact.rows(900, 1200), strict=True):
        assert torch.equal(ours, theirs.bfloat16())


def test_growing_the_tables_changes_nothing() -> None:
    _, tables = both(YARN)
    before = [table.clone() for table in tables.rows(1000, 1010)]
    tables.reach(5000)
    assert all(torch.equal(a, b) for a, b in zip(before, tables.rows(1000, 1010), strict=True))


def test_the_older_names_of_a_scaling_are_read() -> None:
    new = both(YARN)[1].rope
    content: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 256}
    content |= {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4}
    content |= {"max_position_embeddings": 1500, "rope_theta": 1e4}
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    old = DecoderConfig.parse({**content, "rope_scaling": scaling}).ropes[0]
    assert (old.kind, old.theta, old.trained_positions) == ("yarn", 1e4, 512)
    assert torch.equal(inverse_frequencies(old, 0)[0], inverse_frequencies(new, 0)[0])
