"""Tiny random models of every architecture that the lean decoder runs, and how its tests pass a text through them."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

CPU, FLOAT = torch.device("cpu"), torch.float32
LENGTH = 45
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}

# The name of a transformers class without its endings, and what its config has beyond SIZES.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama without groups": ("Llama", {"num_key_value_heads": 4}),
    "llama, all biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, one key-value head": ("Llama", {"num_key_value_heads": 1, "head_dim": 32}),
    "llama, linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama 3": ("Llama", {"rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {}),
    "qwen2, some windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3, yarn, tied": ("Qwen3", {"head_dim": 32, "rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen3, listed windows, biases": (
        "Qwen3",
        {
            "head_dim": 32,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
        },
    ),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2, "tie_word_embeddings": True}),
    "smollm3, listed": ("SmolLM3", {"no_rope_layers": [1, 0, 0, 1], "attention_bias": True, "mlp_bias": True}),
    "smollm3, windows": (
        "SmolLM3",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 9},
    ),
}


def save_model(folder: Path, name: str, options: dict[str, Any]) -> Any:
    """A tiny model whose every parameter is random, norms and biases too, in `folder`; the transformers model."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(0, 0.15)
            if "norm" in key:
                parameter += 1
    model.save_pretrained(folder)
    return model


def random_tokens(count: int = LENGTH, seed: int = 1) -> list[int]:
    return torch.randint(3, 96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def random_prompts(count: int, repeats: int = 1) -> Iterator[list[int]]:
    """One after the other."""
    return (random_tokens(count, seed) * repeats for seed in itertools.count(1))


@torch.inference_mode()
def fresh_logits(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """What transformers computes of the whole text at once, without a cache."""
    return model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]


def in_passes(model: Any, tokens: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    """Logits of all tokens, passed in pieces; the last size goes on to the end."""
    cache = model.new_cache(len(tokens))
    sizes = [*sizes, *[sizes[-1]] * len(tokens)]
    logits = []
    while cache.length < len(tokens):
        logits.append(model.forward(tokens[cache.length : cache.length + sizes.pop(0)], cache))
    return torch.cat(logits)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == FLOAT
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def assert_close_but_for_steps(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Where an activation lies between two of a kernel's 8-bit steps, a last bit decides which one it takes.

    A step is 1 ÷ 127 of the largest activation; few of them are taken otherwise, so logits differ by less than one.
    """
    assert actual.dtype == FLOAT
    assert relative_error(actual, expected) <= 1 / 127


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual − expected‖ ÷ ‖expected‖, in float64."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@torch.inference_mode()
def exact_logits(model: Any, tokens: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """What the model's weights, rounded to a dtype, give in float64: the model is used up."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).double()
    return fresh_logits(model, tokens)
