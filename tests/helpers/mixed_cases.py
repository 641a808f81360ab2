"""Tiny random hybrids with experts, and mixtures beside an MLP: options beyond those of `decoder_cases.py`."""

from typing import Any

import transformers
from packaging.version import Version

NORMS_GROUPS = Version(transformers.__version__) >= Version("5.23")  # of Mamba apart, as Granite 4 has them
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
GRANITE_EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 3, "intermediate_size": 32}
MAMBA = {
    "num_local_experts": 0,
    "shared_intermediate_size": 80,
    "mamba_n_heads": 8,
    "mamba_d_state": 16,
    "mamba_d_head": 16,
    "mamba_chunk_size": 8,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
}

MIXED_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2 moe": (
        "Lfm2Moe",
        {
            **EXPERTS,
            "layer_types": ["conv", "conv", "full_attention", "conv"],
            "num_dense_layers": 1,
            "routed_scaling_factor": 1.7,
            "tie_word_embeddings": True,
        },
    ),
    "lfm2 moe, no corrections, shares as they are": (
        "Lfm2Moe",
        {
            **EXPERTS,
            "layer_types": ["full_attention", "conv"] * 2,
            "num_dense_layers": 2,
            "use_expert_bias": False,
            "norm_topk_prob": False,
            "conv_bias": True,
            "conv_L_cache": 4,
        },
    ),
    "lfm2 moe, experts in all blocks": (
        "Lfm2Moe",
        {
            **EXPERTS,
            "layer_types": ["conv", "full_attention", "conv", "conv"],
            "num_dense_layers": 0,
            "num_experts_per_tok": 1,
            "norm_topk_prob": False,
        },
    ),
    "granite 4, experts": (
        "GraniteMoeHybrid",
        {**MAMBA, **GRANITE_EXPERTS, "attention_multiplier": 0.2, "residual_multiplier": 0.5},
    ),
    "granite 4, experts, groups, biases, rotates": (
        "GraniteMoeHybrid",
        {
            **MAMBA,
            **GRANITE_EXPERTS,
            "num_experts_per_tok": 1,
            "layer_types": ["full_attention", "linear_attention"] * 2,
            "shared_intermediate_size": 32,
            "mamba_n_groups": 2 if NORMS_GROUPS else 1,
            "mamba_proj_bias": True,
            "attention_bias": True,
            "position_embedding_type": "rope",
            "logits_scaling": 4.0,
            "embedding_multiplier": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    "granite moe shared": (
        "GraniteMoeShared",
        {**GRANITE_EXPERTS, "shared_intermediate_size": 48, "residual_multiplier": 0.3, "attention_multiplier": 0.2},
    ),
    "granite moe shared, nothing shared": (
        "GraniteMoeShared",
        {**GRANITE_EXPERTS, "shared_intermediate_size": 0, "attention_bias": True, "embedding_multiplier": 3.0},
    ),
}
