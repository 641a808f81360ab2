"""Architectures with experts in place of the MLPs of some blocks."""

from typing import Any

from quasar_core.models.architectures.row import (
    ATTENTION_BIASES,
    GRANITE_DEFAULTS,
    GRANITE_SCALES,
    Architecture,
    HeadNorms,
    LayerNames,
    Mixture,
    Windows,
)

QWEN_MIXTURE: dict[str, Any] = {
    "normalised": "norm_topk_prob",
    "step": "decoder_sparse_step",
    "without": "mlp_only_layers",
}
SIGMOID_MIXTURE: dict[str, Any] = {
    "counts": ("n_routed_experts", "num_local_experts"),
    "scores": "sigmoid",
    "normalised": "norm_topk_prob",
    "scale": "routed_scaling_factor",
    "correction": "gate.e_score_correction_bias",
    "shared": "shared_experts",
    "shared_count": "n_shared_experts",
    "first": "first_k_dense_replace",
}
GRANITE_MIXTURE: dict[str, Any] = {
    "module": "block_sparse_moe",
    "router": "router.layer",
    "counts": ("num_local_experts",),
    "inner": "intermediate_size",
    "scores": "chosen",
    "renamed": ((".router.layer.", ".router."),),
}
GRANITE_SHARED: dict[str, Any] = {"shared_mlp": True, "shared_inner": "shared_intermediate_size"}
GRANITE_SHARED_NAMES = LayerNames(mlp="shared_mlp", gate_up="input_linear", down="output_linear")
ONE_GROUP: dict[str, Any] = {"n_group": (1, None), "topk_group": (1, None)}  # of experts to choose from

MIXTURES: dict[str, Architecture] = {
    "MixtralForCausalLM": Architecture(
        "mixtral",
        "Mixtral",
        windows=Windows("all"),
        mixture=Mixture(
            module="block_sparse_moe",
            parts=("w1", "w3", "w2"),
            counts=("num_local_experts",),
            inner="intermediate_size",
            renamed=(
                (".block_sparse_moe.", ".mlp."),
                (".w1.", ".gate_proj."),
                (".w3.", ".up_proj."),
                (".w2.", ".down_proj."),
            ),
        ),
        defaults={
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
        },
    ),
    "Qwen2MoeForCausalLM": Architecture(
        "qwen2_moe",
        "Qwen1.5-MoE, Qwen2-MoE",
        qkv_bias="qkv_bias",
        windows=Windows("listed", period=2),  # every second one, before `max_window_layers`
        mixture=Mixture(
            **QWEN_MIXTURE,
            usual_count=60,
            shared="shared_expert",
            shared_inner="shared_expert_intermediate_size",
            shared_gate="shared_expert_gate",
        ),
        defaults={
            "qkv_bias": True,
            "num_key_value_heads": 16,
            "sliding_window": 4096,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts_per_tok": 4,
            "decoder_sparse_step": 1,
        },
    ),
    "Qwen3MoeForCausalLM": Architecture(
        "qwen3_moe",
        "Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder",
        **ATTENTION_BIASES,
        head_norms=HeadNorms(),
        mixture=Mixture(**QWEN_MIXTURE, usual_count=128),
        only={"use_sliding_window": (False, None)},
        defaults={
            "num_key_value_heads": 4,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "decoder_sparse_step": 1,
        },
    ),
    "OlmoeForCausalLM": Architecture(
        "olmoe",
        "OLMoE",
        **ATTENTION_BIASES,
        head_norms=HeadNorms(whole_rows=True),
        mixture=Mixture(counts=("num_experts",), inner="intermediate_size", normalised="norm_topk_prob"),
        only={"clip_qkv": (None,)},
        defaults={"rms_norm_eps": 1e-5, "num_experts_per_tok": 8, "num_experts": 64},
    ),
    "GraniteMoeForCausalLM": Architecture(
        "granitemoe",
        "Granite 3 with experts",
        **ATTENTION_BIASES,
        scales=GRANITE_SCALES,
        mixture=Mixture(**GRANITE_MIXTURE),
        defaults={**GRANITE_DEFAULTS, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "GraniteMoeSharedForCausalLM": Architecture(
        "granitemoeshared",
        "Granite 3 with experts and an MLP beside them",
        **ATTENTION_BIASES,
        scales=GRANITE_SCALES,
        names=GRANITE_SHARED_NAMES,
        fused=frozenset(("gate_up",)),
        inner_option="shared_intermediate_size",
        mixture=Mixture(**GRANITE_MIXTURE, **GRANITE_SHARED),
        defaults={
            **GRANITE_DEFAULTS,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 0,
        },
    ),
    "Glm4MoeForCausalLM": Architecture(
        "glm4_moe",
        "GLM-4.5, GLM-4.6",
        qkv_bias="attention_bias",
        head_norms=HeadNorms(option="use_qk_norm"),
        rotates_part=True,
        mixture=Mixture(**SIGMOID_MIXTURE, usual_count=128),
        only=ONE_GROUP,
        further_blocks="num_nextn_predict_layers",
        defaults={
            "num_key_value_heads": 8,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-5,
            "moe_intermediate_size": 1408,
            "num_experts_per_tok": 8,
            "n_shared_experts": 1,
            "routed_scaling_factor": 1.0,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "num_nextn_predict_layers": 1,
        },
    ),
    "Dots1ForCausalLM": Architecture(
        "dots1",
        "dots.llm1",
        **ATTENTION_BIASES,
        head_norms=HeadNorms(),
        windows=Windows("listed"),
        mixture=Mixture(**SIGMOID_MIXTURE),
        only=ONE_GROUP,
        defaults={
            "num_key_value_heads": 32,
            "max_window_layers": 62,
            "moe_intermediate_size": 1408,
            "routed_scaling_factor": 1.0,
            "first_k_dense_replace": 0,
        },
    ),
}
