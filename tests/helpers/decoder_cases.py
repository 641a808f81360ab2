"""Tiny random models of every architecture that the lean decoder runs, and how its tests pass a text through them."""

import copy
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from helpers.mixed_cases import EXPERTS, MAMBA, MIXED_CASES, NORMS_GROUPS
from helpers.model_classes import classes_of

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

GEMMA = {"query_pre_attn_scalar": 24, "tie_word_embeddings": True}
GEMMA_4 = {"head_dim": 16, "global_head_dim": 32, "layer_types": ["sliding_attention", "full_attention"] * 2}
GEMMA_4_EXPERTS = {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 3, "moe_intermediate_size": 32}
SLIDING = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
SIGMOIDS = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 1,
}
MUSE = {"sliding_window": 6, "layer_types": SLIDING, "layer_rope_theta": [0, 9.0, 9.0, 0], "rope_parameters": LLAMA3}
MUSE |= {"qk_scale_factor": 1.5, "output_multiplier": 2.0, "final_logit_softcapping": 3.0, "post_norm_eps": 0.1}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

DELTA = {
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}

# The name of a transformers class without its endings, and what its config has beyond SIZES.
# Families whose logits are held to 1e-5 itself; others amplify what float32 rounds (norms of 1 + w, growing queries).
STRICT = {"Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3"}
# And one whose norms of what states give amplify it most: transformers' own logits differ so, passed token by token.
AMPLIFYING = {"Qwen3_5": 4.0, "Qwen3_5Moe": 4.0, "GraniteMoeHybrid": 4.0}

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
    "ministral": ("Ministral", {"head_dim": 32, "sliding_window": 7, "layer_types": SLIDING}),
    "ministral 3": ("Ministral3", {"head_dim": 32, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.4}}),
    "gemma 2": ("Gemma2", {"head_dim": 32, "sliding_window": 7, "attn_logit_softcapping": 2.0, **GEMMA}),
    "gemma 2, no caps": ("Gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None, **GEMMA}),
    "gemma 3": ("Gemma3", {"head_dim": 32, "sliding_window": 7, "layer_types": SLIDING, **GEMMA}),
    "gemma 3, two ropes": (
        "Gemma3",
        {
            "head_dim": 32,
            "sliding_window": 6,
            "sliding_window_pattern": 2,
            "rope_parameters": TWO_ROPES,
            "attention_bias": True,
            "final_logit_softcapping": 3.0,
            **GEMMA,
        },
    ),
    "gemma 4": ("Gemma4", {"sliding_window": 7, "hidden_size_per_layer_input": 0, **GEMMA_4}),
    "gemma 4, keys are values": (
        "Gemma4",
        {
            "sliding_window": 7,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "final_logit_softcapping": 3.0,
            "attention_bias": True,
            **GEMMA_4,
        },
    ),
    "gemma 4, shared states and own inputs": (
        "Gemma4",
        {
            "sliding_window": 6,
            "num_hidden_layers": 5,
            "layer_types": [
                "sliding_attention",
                "full_attention",
                "sliding_attention",
                "sliding_attention",
                "full_attention",
            ],
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 96,
            "use_double_wide_mlp": True,
            **{key: value for key, value in GEMMA_4.items() if key != "layer_types"},
        },
    ),
    "gemma 4, experts": (
        "Gemma4",
        {"sliding_window": 7, "hidden_size_per_layer_input": 0, **GEMMA_4, **GEMMA_4_EXPERTS},
    ),
    "gemma 4, experts, keys are values, own inputs": (
        "Gemma4",
        {
            "sliding_window": 7,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 96,
            "attention_k_eq_v": True,
            "final_logit_softcapping": 3.0,
            **GEMMA_4,
            **GEMMA_4_EXPERTS,
            "top_k_experts": 1,
        },
    ),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "logits_scaling": 4.0,
            "tie_word_embeddings": True,
        },
    ),
    "granite, all biases": ("Granite", {"attention_bias": True, "mlp_bias": True, "attention_multiplier": 0.3}),
    "seed-oss": ("SeedOss", {"head_dim": 32, "attention_out_bias": True, "mlp_bias": True}),
    "hunyuan": ("HunYuanDenseV1", {"head_dim": 32, "attention_bias": True}),
    "hunyuan, alpha": (
        "HunYuanDenseV1",
        {"head_dim": 32, "rope_parameters": {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0}},
    ),
    "cwm": ("Cwm", {"head_dim": 32, "sliding_window": 7}),
    "phi 3": ("Phi3", {}),
    "phi 3, a part rotates, window": (
        "Phi3",
        {"sliding_window": 9, "rope_parameters": {"partial_rotary_factor": 0.75, "rope_theta": 1e4}},
    ),
    "olmo 2": ("Olmo2", {"num_key_value_heads": 2}),
    "olmo 3": ("Olmo3", {"sliding_window": 7}),
    "olmo 3, yarn in full layers": (
        "Olmo3",
        {"sliding_window": 6, "rope_parameters": {"full_attention": YARN, "sliding_attention": None}},
    ),
    "exaone 4": ("Exaone4", {"sliding_window": 7}),
    "exaone 4, no windows": ("Exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
    "glm 4": ("Glm4", {"head_dim": 32}),
    "glm 4, no biases": ("Glm4", {"head_dim": 32, "attention_bias": False, "num_key_value_heads": 4}),
    "muse glimmer": ("MuseGlimmer", {"head_dim": 32, "sliding_window": 7}),
    "muse glimmer, listed, biases": ("MuseGlimmer", {**MUSE, "attention_bias": True, "tie_word_embeddings": True}),
    "arcee": ("Arcee", {"mlp_bias": True, "attention_bias": True}),
    "apertus": ("Apertus", {"rope_parameters": LLAMA3}),
    "qwen3.5": ("Qwen3_5", {"layer_types": ["linear_attention", "full_attention"] * 2, **DELTA}),
    "qwen3.5, one head of keys, biases": (
        "Qwen3_5",
        {
            **DELTA,
            "linear_num_key_heads": 1,
            "linear_conv_kernel_dim": 3,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "qwen3.5 moe": (
        "Qwen3_5Moe",
        {
            "layer_types": ["linear_attention", "full_attention"] * 2,
            **DELTA,
            **EXPERTS,
            "shared_expert_intermediate_size": 48,
        },
    ),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "conv", "full_attention", "conv"], "tie_word_embeddings": True}),
    "lfm2, biases, plain MLP": (
        "Lfm2",
        {"full_attn_idxs": [1, 3], "conv_bias": True, "conv_L_cache": 4, "block_auto_adjust_ff_dim": False},
    ),
    "granite 4": ("GraniteMoeHybrid", {"attention_multiplier": 0.2, "residual_multiplier": 0.5, **MAMBA}),
    "granite 4, groups, biases, rotates": (
        "GraniteMoeHybrid",
        {
            **MAMBA,
            "mamba_n_groups": 2 if NORMS_GROUPS else 1,
            "mamba_proj_bias": True,
            "attention_bias": True,
            "position_embedding_type": "rope",
            "logits_scaling": 4.0,
            "embedding_multiplier": 3.0,
        },
    ),
    "granite 4, attention alone": ("GraniteMoeHybrid", {**MAMBA, "layer_types": ["full_attention"] * 4}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral, window": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 7}),
    "qwen 2 moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 48}),
    "qwen 2 moe, some blocks": (
        "Qwen2Moe",
        {**EXPERTS, "shared_expert_intermediate_size": 32, "norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    "qwen 3 moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 32, "norm_topk_prob": True}),
    "qwen 3 moe, every second block": (
        "Qwen3Moe",
        {**EXPERTS, "head_dim": 32, "decoder_sparse_step": 2, "attention_bias": True, "num_experts_per_tok": 4},
    ),
    "olmoe": ("Olmoe", {**EXPERTS, "num_key_value_heads": 2}),
    "olmoe, shares of one": ("Olmoe", {**EXPERTS, "norm_topk_prob": True, "num_experts_per_tok": 1}),
    "granite moe": (
        "GraniteMoe",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "logits_scaling": 4.0,
        },
    ),
    "glm 4 moe": ("Glm4Moe", {**SIGMOIDS, "head_dim": 32, "use_qk_norm": True}),
    "glm 4 moe, no norms": (
        "Glm4Moe",
        {
            **SIGMOIDS,
            "head_dim": 32,
            "attention_bias": True,
            "norm_topk_prob": False,
            "first_k_dense_replace": 0,
            "n_shared_experts": 2,
        },
    ),
    "dots 1": ("Dots1", {**SIGMOIDS, "norm_topk_prob": True, "n_group": 1, "topk_group": 1}),
    **MIXED_CASES,
}
CENTRED = ("Gemma2", "Gemma3", "Qwen3_5", "Qwen3_5Moe", "MuseGlimmer")  # whose norms are 1 + w
RECURRENT = {"Qwen3_5", "Qwen3_5Moe", "Lfm2", "Lfm2Moe", "GraniteMoeHybrid"}
MIXTURES = {"Qwen3_5Moe", "Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "GraniteMoe", "GraniteMoeShared"}
MIXTURES |= {"Glm4Moe", "Dots1", "Lfm2Moe"}


def recorded_cases(*without: str) -> list[str]:
    """The cases that fast passes run; `without` experts, where they do not run these."""
    left_out = RECURRENT | (MIXTURES if "experts" in without else set())
    beside = [case for case, (_, options) in CASES.items() if "experts" in without and options.get("enable_moe_block")]
    return [case for case, (family, _) in CASES.items() if family not in left_out and case not in beside]


def save_model(folder: Path, name: str, options: dict[str, Any]) -> Any:
    """A tiny model whose every parameter is random, norms and biases too, in `folder`; the transformers model."""
    torch.manual_seed(0)
    config_class, model_class = classes_of(name)
    options = copy.deepcopy(options)  # transformers writes into what it is given
    model = model_class(config_class(**{**SIZES, **options})).eval()
    if name == "Gemma2":
        model.set_attn_implementation("eager")  # sdpa of older transformers leaves soft caps out
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(0, 0.15)
            small = name == "Gemma4" and "q_norm" in key  # whose scores nothing divides
            if key.endswith("router.scale"):
                parameter += 8  # or all experts would have about the same scores
            plain = "linear_attn" in key or (name == "MuseGlimmer" and key == "model.norm.weight")
            if "norm" in key and not small and (plain or name not in CENTRED):
                parameter += 1
        for key, buffer in model.named_buffers():
            if key.endswith("layer_scalar"):
                buffer.fill_(0.7)
            if key.endswith(("e_score_correction_bias", "expert_bias")):
                buffer.uniform_(-0.5, 0.5)
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


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, case: str | None = None, family: str | None = None
) -> None:
    """To 1e-5 of the largest logit, as float32 rounds sums of such, more where a family amplifies that.

    A case of strict families is held to 1e-5 itself; one with options of its own gives its family alone.
    """
    assert actual.dtype == FLOAT
    is_strict = case is not None and CASES[case][0] in STRICT
    amplified = AMPLIFYING.get(CASES[case][0] if case is not None else family or "", 1.0)
    scale = 1.0 if is_strict else max(1.0, float(expected.abs().max())) * amplified
    torch.testing.assert_close(actual, expected, atol=1e-5 * scale, rtol=1e-5)


def assert_close_but_for_steps(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Where an activation lies between two of a kernel's 8-bit steps, a last bit decides which one it takes.

    A step is 1 ÷ 127 of the largest activation. Few of them are taken otherwise, and what they change lets some behind
    them be, so logits differ by less than two.
    """
    assert actual.dtype == FLOAT
    assert relative_error(actual, expected) <= 2 / 127


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual − expected‖ ÷ ‖expected‖, in float64."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@torch.inference_mode()
def exact_logits(model: Any, tokens: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """What the model's weights, rounded to a dtype, give in float64: the model is used up."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).double()
    return fresh_logits(model, tokens)
