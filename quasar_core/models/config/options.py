"""The options of a config.json: which must be there, which have no effect on a pass, and of which types the others are.

The architectures' own options stand in their rows of the table (`architectures/`).
"""

from collections.abc import Mapping
from math import inf
from typing import Any

from quasar_core.models.config.rope import LAYER_TYPES, ROPE_TYPES
from quasar_core.typed import build

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)

# Options that transformers reads for any model, in its masks and caches, and the values that the decoder has.
ONLY_VALUES: dict[str, Any] = {"is_causal": (True,), "attention_chunk_size": (None,), "per_layer_config": (None,)}
# Options that have no effect on a pass: training, files, generation, and names.
WITHOUT_EFFECT = frozenset(
    (
        "attention_dropout",
        "embd_pdrop",
        "eod_token_id",
        "resid_pdrop",
        "residual_dropout",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "mamba_chunk_size",
        "num_mtp_layers",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "output_router_logits",
        "router_jitter_noise",
        "top_k_experts",
        "transformers_version",
        "use_cache",
    )
)


# The types of the options of config.json that the decoder computes with.
_WHOLE, _NUMBER, _SWITCH = int | None, float | None, bool | None
_OPTION_TYPES: dict[str, Any] = {
    **dict.fromkeys(REQUIRED, int),
    **dict.fromkeys(
        (
            "num_key_value_heads",
            "head_dim",
            "sliding_window",
            "max_window_layers",
            "no_rope_layer_interval",
            "global_head_dim",
            "num_global_key_value_heads",
            "num_kv_shared_layers",
            "hidden_size_per_layer_input",
            "vocab_size_per_layer_input",
            "full_attention_interval",
            "linear_conv_kernel_dim",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_num_key_heads",
            "linear_num_value_heads",
            "conv_L_cache",
            "block_multiple_of",
            "block_ff_dim",
            "shared_intermediate_size",
            "mamba_n_heads",
            "mamba_n_groups",
            "mamba_d_state",
            "mamba_d_conv",
            "mamba_expand",
            "num_local_experts",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "num_experts",
            "n_routed_experts",
            "n_shared_experts",
            "num_experts_per_tok",
            "decoder_sparse_step",
            "first_k_dense_replace",
            "num_dense_layers",
            "num_nextn_predict_layers",
        ),
        _WHOLE,
    ),
    **dict.fromkeys(
        (
            "attention_dropout",
            "rms_norm_eps",
            "rope_theta",
            "rope_local_base_freq",
            "partial_rotary_factor",
            "embedding_multiplier",
            "residual_multiplier",
            "attention_multiplier",
            "logits_scaling",
            "query_pre_attn_scalar",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "norm_eps",
            "block_ffn_dim_multiplier",
            "routed_scaling_factor",
            "post_norm_eps",
            "qk_scale_factor",
            "output_multiplier",
        ),
        _NUMBER,
    ),
    **dict.fromkeys(
        (
            "use_cache",
            "tie_word_embeddings",
            "attention_bias",
            "attention_out_bias",
            "mlp_bias",
            "bias",
            "use_sliding_window",
            "attention_k_eq_v",
            "use_double_wide_mlp",
            "conv_bias",
            "block_auto_adjust_ff_dim",
            "tie_embedding",
            "mamba_conv_bias",
            "mamba_proj_bias",
            "qkv_bias",
            "norm_topk_prob",
            "use_expert_bias",
            "use_qk_norm",
        ),
        _SWITCH,
    ),
    "per_layer_config": dict | None,
    "hidden_act": str | None,
    "hidden_activation": str | None,
    "layer_types": list[str] | None,
    "no_rope_layers": list[int] | None,
    "layer_rope_theta": list[float] | None,
    "full_attn_idxs": list[int] | None,
    "layers_block_type": list[str] | None,
    "mamba_d_head": int | str | None,
    "position_embedding_type": str | None,
    "time_step_limit": list | None,
    "mlp_only_layers": list[int] | None,
    "rope_scaling": dict | None,
    "rope_parameters": dict | None,
}


def wrong_option(options: Mapping[str, Any]) -> str | None:
    """What is wrong with the first option that is of another type, or no number of any use; None where none is."""
    try:
        _check_types(options, _OPTION_TYPES, "")
        for name in ("rope_scaling", "rope_parameters"):
            _check_rope_types(options.get(name) or {}, f"{name}.")
    except ValueError as error:
        return str(error)
    return None


def _check_rope_types(rope: Mapping[str, Any], where: str) -> None:
    _check_types(rope, ROPE_TYPES, where)
    for kind in LAYER_TYPES:
        if isinstance(rope.get(kind), Mapping):
            _check_types(rope[kind], ROPE_TYPES, f"{where}{kind}.")


def _check_types(options: Mapping[str, Any], types: Mapping[str, Any], where: str) -> None:
    for name, kind in types.items():
        if name in options:
            value = build(kind, options[name], where + name)
            if isinstance(value, float) and not 0 <= value < inf:
                raise ValueError(f"{where}{name} is {value}")
