"""Architectures with a state in place of attention in some blocks."""

from typing import Any

from quasar_core.models.architectures.mixtures import GRANITE_MIXTURE, GRANITE_SHARED, GRANITE_SHARED_NAMES
from quasar_core.models.architectures.row import (
    ATTENTION_BIASES,
    GRANITE_DEFAULTS,
    GRANITE_SCALES,
    Architecture,
    BlockNorms,
    HeadNorms,
    LayerNames,
    Mixture,
    Recurrent,
)

DELTA: dict[str, Any] = {
    **ATTENTION_BIASES,
    "head_norms": HeadNorms(),
    "centred_norms": True,
    "rotates_part": True,
    "gates_attention": True,
    "recurrent": Recurrent("delta", "linear_attn", period=4, interval="full_attention_interval"),
}
DELTA_DEFAULTS: dict[str, Any] = {
    "head_dim": 256,
    "num_key_value_heads": 4,
    "partial_rotary_factor": 0.25,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
LFM2: dict[str, Any] = {
    "norms": BlockNorms("operator_norm", "", "ffn_norm", ""),
    "head_norms": HeadNorms(("q_layernorm", "k_layernorm")),
    "names": LayerNames(out="out_proj", mlp="feed_forward", gate="w1", up="w3", down="w2", last_norm="embedding_norm"),
    "eps_option": "norm_eps",
}
LFM2_DEFAULTS: dict[str, Any] = {
    "norm_eps": 1e-5,
    "num_key_value_heads": 8,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "conv_bias": False,
    "conv_L_cache": 3,
}

RECURRENT: dict[str, Architecture] = {
    "Qwen3_5ForCausalLM": Architecture(
        "qwen3_5_text",
        "Qwen3.5, Qwen3.6, Qwen3.8, text, without experts",
        **DELTA,
        defaults=DELTA_DEFAULTS,
    ),
    "Qwen3_5MoeForCausalLM": Architecture(
        "qwen3_5_moe_text",
        "Qwen3.5-35B-A3B and its kin, text",
        **DELTA,
        mixture=Mixture(
            usual_count=256,
            scores="chosen",  # of the same shares as a softmax of all that is made to sum to 1
            shared="shared_expert",
            shared_inner="shared_expert_intermediate_size",
            shared_gate="shared_expert_gate",
        ),
        inner_option="moe_intermediate_size",
        defaults={
            **DELTA_DEFAULTS,
            "num_key_value_heads": 2,
            "intermediate_size": 512,  # which its configs do not name, as no block has an MLP
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "num_experts_per_tok": 8,
        },
    ),
    "Lfm2ForCausalLM": Architecture(
        "lfm2",
        "LFM2",
        **LFM2,
        recurrent=Recurrent("conv", "conv", ("conv",), attends="full_attn_idxs"),
        aliases={"tie_embedding": "tie_word_embeddings", "block_ff_dim": "intermediate_size"},
        defaults={
            **LFM2_DEFAULTS,
            "block_multiple_of": 256,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": True,
        },
    ),
    "Lfm2MoeForCausalLM": Architecture(
        "lfm2_moe",
        "LFM2-8B-A1B, LFM2-24B-A2B",
        **LFM2,
        recurrent=Recurrent("conv", "conv", ("conv",)),
        aliases={"tie_embedding": "tie_word_embeddings"},
        mixture=Mixture(
            module="feed_forward",
            parts=("w1", "w3", "w2"),
            counts=("num_experts",),
            scores="sigmoid",
            normalised="norm_topk_prob",
            added=1e-6,
            scale="routed_scaling_factor",
            correction="expert_bias",
            correction_option="use_expert_bias",
            first="num_dense_layers",
            renamed=((".w1.", ".gate_proj."), (".w3.", ".up_proj."), (".w2.", ".down_proj.")),
        ),
        defaults={
            **LFM2_DEFAULTS,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "num_dense_layers": 2,
            "moe_intermediate_size": 1792,
            "use_expert_bias": True,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
        },
    ),
    "GraniteMoeHybridForCausalLM": Architecture(
        "granitemoehybrid",
        "Granite 4",
        **ATTENTION_BIASES,
        rotates="named",
        recurrent=Recurrent("mamba", "mamba", ("mamba", "linear_attention")),
        names=GRANITE_SHARED_NAMES,
        fused=frozenset(("gate_up",)),
        inner_option="shared_intermediate_size",
        scales=GRANITE_SCALES,
        aliases={"layers_block_type": "layer_types"},
        mixture=Mixture(**GRANITE_MIXTURE, **GRANITE_SHARED, option="num_local_experts"),
        defaults={
            **GRANITE_DEFAULTS,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 1024,
            "mamba_n_heads": 128,
            "mamba_n_groups": 1,
            "mamba_d_state": 256,
            "mamba_d_head": "auto",
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_conv_bias": True,
            "mamba_proj_bias": False,
        },
    ),
}
