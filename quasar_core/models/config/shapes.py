"""Published shapes of models, as transformers and the architecture table read them in a config.json."""

from typing import Any

from quasar_core.errors import UsageError


def _config(
    architecture: str, layers: int, hidden: int, intermediate: int, heads: int, vocabulary: int, **others: Any
) -> dict[str, Any]:
    """A config.json; every shape here has 8 key-value heads of size 128."""
    return {
        "architectures": [architecture],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": vocabulary,
        "hidden_act": "silu",
        "dtype": "bfloat16",
        **others,
    }


def _qwen3(layers: int, hidden: int, intermediate: int, heads: int, tied: bool) -> dict[str, Any]:
    return _config(
        "Qwen3ForCausalLM",
        layers,
        hidden,
        intermediate,
        heads,
        151_936,
        model_type="qwen3",
        attention_bias=False,
        max_position_embeddings=40_960,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=tied,
    )


def _llama3(layers: int, hidden: int, inner: int, heads: int) -> dict[str, Any]:
    return _config(
        "LlamaForCausalLM",
        layers,
        hidden,
        inner,
        heads,
        128_256,
        model_type="llama",
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        tie_word_embeddings=False,
    )


SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-32b": _qwen3(64, 5120, 25_600, 64, tied=False),
    "qwen3-8b": _qwen3(36, 4096, 12_288, 32, tied=False),
    "qwen3-4b": _qwen3(36, 2560, 9728, 32, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 6144, 16, tied=True),
    "qwen3-0.6b": _qwen3(28, 1024, 3072, 16, tied=True),
    "llama3-8b": _llama3(32, 4096, 14_336, 32),
    "llama3-70b": _llama3(80, 8192, 28_672, 64),
    "openpangu-7b": _config(
        "PanguEmbeddedForCausalLM",
        34,
        4096,
        12_800,
        32,
        153_376,
        model_type="PanguEmbedded",
        bias=True,
        max_position_embeddings=32_768,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 16e6},
        tie_word_embeddings=False,
    ),
}


def shape_named(flag: str, name: str) -> dict[str, Any]:
    """The config of a shape; UsageError that names the flag."""
    if name not in SHAPES:
        raise UsageError(f"{flag} must be one of {', '.join(SHAPES)}, not {name}.")
    return dict(SHAPES[name])
