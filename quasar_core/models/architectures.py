"""The architectures that the lean decoder runs: one skeleton, a row of switches each.

A row says where an architecture departs from Llama's skeleton; a switch may name the option of config.json that sets
it. `docs/architectures.md` shows how to add one, and `decoder_config.py` reads a config.json by its row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from quasar_core.models.mixture import Mixture

Switch = bool | str  # or the option of config.json that says so
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "relu2": "relu2", "xielu": "xielu"}


@dataclass(frozen=True)
class BlockNorms:
    """Names of a block's norms in the files: before and behind attention, before and behind the MLP; "" is none."""

    before_attention: str = "input_layernorm"
    behind_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    behind_mlp: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Those that a block has."""
        every = (self.before_attention, self.behind_attention, self.before_mlp, self.behind_mlp)
        return tuple(name for name in every if name)


BEFORE = BlockNorms()
BEHIND = BlockNorms("", "post_attention_layernorm", "", "post_feedforward_layernorm")
GEMMA_NORMS = BlockNorms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
GLM_NORMS = BlockNorms("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
APERTUS_NORMS = BlockNorms("attention_layernorm", "", "feedforward_layernorm", "")


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms of queries and keys: of each head, or of all heads as one row; before the rotation, or after it."""

    names: tuple[str, str] = ("q_norm", "k_norm")
    whole_rows: bool = False
    after_rotation: bool = False
    option: str = ""  # that says whether there are any; "" is yes
    of_values: bool = False  # each value's too, without a weight


@dataclass(frozen=True)
class Windows:
    """Which layers slide.

    `kind`: none; all; those of `layer_types`, or from `max_window_layers` on, where `use_sliding_window` is on
    ("listed"); those of `layer_types`, or all but one layer in every `period` ("typed").
    """

    kind: Literal["none", "all", "listed", "typed"] = "none"
    period: int = 0  # of the layers that see everything; 0: there are none
    first: int = -1  # of them; −1 is the period's last
    option: str = ""  # that gives another period


@dataclass(frozen=True)
class LayerNames:
    """Names in the files of a block's parts, and of the norm before the head."""

    attention: str = "self_attn"
    out: str = "o_proj"
    mlp: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    gate_up: str = "gate_up_proj"  # where they are stored as one
    last_norm: str = "norm"


@dataclass(frozen=True)
class Recurrent:
    """Layers with a state in place of attention: those that `layer_types` lists so, or the option that says which.

    Without either, all but one in every `period`, or all; `interval` names an option with another period, `attends`
    one that lists the layers of attention.
    """

    kind: Literal["delta", "mamba", "conv"]
    module: str  # in the files
    types: tuple[str, ...] = ("linear_attention",)
    period: int = 0
    interval: str = ""
    attends: str = ""


@dataclass(frozen=True)
class Scales:
    """Options of config.json with constant factors, by what they multiply; "" is none."""

    embedding: str = ""  # or "√hidden"
    residual: str = ""
    scores: str = ""  # in place of 1 ÷ √D
    scores_are_plain: bool = False  # neither divided nor multiplied
    scores_root: str = ""  # the number whose inverse root stands in place of 1 ÷ √D
    logits_divisor: str = ""


@dataclass(frozen=True)
class Architecture:
    """A row of the table. `defaults` are the options that hold where config.json does not name them."""

    model_type: str  # by which transformers chooses the class
    models: str  # that have this architecture, for people
    qkv_bias: Switch = False
    out_bias: Switch = False
    mlp_bias: Switch = False
    norms: BlockNorms = BEFORE
    centred_norms: bool = False  # what is stored is the norm's weight less 1
    head_norms: HeadNorms | None = None
    windows: Windows = Windows()
    # Layers: all; by `no_rope_layers`; sliding where any are; all or none by `position_embedding_type`.
    rotates: Literal["all", "marked", "sliding", "named"] = "all"
    ropes_by_type: bool = False  # full and sliding layers rotate by different frequencies
    rotates_part: bool = False  # of a head: `partial_rotary_factor`
    interleaved: bool = False  # channels 2i and 2i + 1 rotate together, not i and i + D/2
    grows_queries: bool = False  # by `llama_4_scaling_beta`, with the position
    gated: bool = True  # the MLP
    activation_option: str = "hidden_act"
    fused: frozenset[str] = frozenset()  # "qkv", "gate_up": stored as one layer
    scales: Scales = Scales()
    scores_cap: str = ""  # the option with the soft cap of attention's scores
    logits_cap: str = ""
    gates_attention: bool = False  # each head's mix, by a gate that is stored behind its queries
    recurrent: Recurrent | None = None
    names: LayerNames = LayerNames()
    inner_option: str = "intermediate_size"
    eps_option: str = "rms_norm_eps"
    aliases: Mapping[str, str] = field(default_factory=dict)  # other names of options, which count before
    mixture: Mixture | None = None  # of experts, in the place of the MLPs of some blocks
    further_blocks: str = ""  # the option with the number of stored blocks behind the last one, which do not run
    blocks_differ: bool = False  # as Gemma 4's do: in head size, heads, MLP, in whose keys and values they read
    only: Mapping[str, Any] = field(default_factory=dict)  # options of which the decoder has but one value
    defaults: Mapping[str, Any] = field(default_factory=dict)


ALL_BIASES: dict[str, Any] = {"qkv_bias": "attention_bias", "out_bias": "attention_bias", "mlp_bias": "mlp_bias"}
ATTENTION_BIASES: dict[str, Any] = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
GEMMA: dict[str, Any] = {
    **ATTENTION_BIASES,
    "norms": GEMMA_NORMS,
    "centred_norms": True,
    "activation_option": "hidden_activation",
    "logits_cap": "final_logit_softcapping",
}
GEMMA_DEFAULTS: dict[str, Any] = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
GRANITE_SCALES = Scales(
    "embedding_multiplier", "residual_multiplier", "attention_multiplier", logits_divisor="logits_scaling"
)
GRANITE_DEFAULTS: dict[str, Any] = {
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "logits_scaling": 1.0,
}
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
    "corrected": True,
    "shared": "shared_experts",
    "shared_count": "n_shared_experts",
    "first": "first_k_dense_replace",
}
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
ONE_GROUP: dict[str, Any] = {"n_group": (1, None), "topk_group": (1, None)}  # of experts to choose from
CAUSAL_ONLY: dict[str, Any] = {"use_bidirectional_attention": (None, False)}

ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture("llama", "Llama 2 and 3, SmolLM2", **ALL_BIASES),
    "MistralForCausalLM": Architecture(
        "mistral",
        "Mistral 7B, Nemo, Small 3",
        windows=Windows("all"),
        defaults={"sliding_window": 4096, "num_key_value_heads": 8},
    ),
    "MinistralForCausalLM": Architecture(
        "ministral",
        "Ministral 8B of 2024",
        windows=Windows("typed"),
        defaults={"sliding_window": 4096, "num_key_value_heads": 8},
    ),
    "Ministral3ForCausalLM": Architecture(
        "ministral3",
        "Ministral 3",
        windows=Windows("all"),
        grows_queries=True,
        defaults={
            "head_dim": 128,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale_all_dim": 1.0,
                "mscale": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    "Qwen2ForCausalLM": Architecture(
        "qwen2",
        "Qwen2, Qwen2.5",
        qkv_bias=True,
        windows=Windows("listed"),
        defaults={"sliding_window": 4096, "num_key_value_heads": 32},
    ),
    "Qwen3ForCausalLM": Architecture(
        "qwen3",
        "Qwen3",
        **ATTENTION_BIASES,
        head_norms=HeadNorms(),
        windows=Windows("listed"),
        defaults={"head_dim": 128, "sliding_window": 4096, "num_key_value_heads": 32},
    ),
    "SmolLM3ForCausalLM": Architecture(
        "smollm3",
        "SmolLM3",
        **ALL_BIASES,
        windows=Windows("listed"),
        rotates="marked",
        defaults={"rope_theta": 2e6, "tie_word_embeddings": True, "num_key_value_heads": 4},
    ),
    "PanguEmbeddedForCausalLM": Architecture("PanguEmbedded", "OpenPangu-Embedded", qkv_bias="bias", out_bias="bias"),
    "Gemma2ForCausalLM": Architecture(
        "gemma2",
        "Gemma 2",
        **GEMMA,
        windows=Windows("typed", period=2),
        scales=Scales("√hidden", scores_root="query_pre_attn_scalar"),
        scores_cap="attn_logit_softcapping",
        only=CAUSAL_ONLY,
        defaults={**GEMMA_DEFAULTS, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    ),
    "Gemma3ForCausalLM": Architecture(
        "gemma3_text",
        "Gemma 3, text",
        **GEMMA,
        head_norms=HeadNorms(),
        windows=Windows("typed", period=6, option="sliding_window_pattern"),
        ropes_by_type=True,
        scales=Scales("√hidden", scores_root="query_pre_attn_scalar"),
        only={**CAUSAL_ONLY, "attn_logit_softcapping": (None,)},
        defaults={**GEMMA_DEFAULTS, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
    ),
    "Gemma4ForCausalLM": Architecture(
        "gemma4_text",
        "Gemma 4, text, without experts",
        **{**GEMMA, "centred_norms": False},
        head_norms=HeadNorms(of_values=True),
        windows=Windows("typed", period=6),
        ropes_by_type=True,
        scales=Scales("√hidden", scores_are_plain=True),
        blocks_differ=True,
        only={
            "use_bidirectional_attention": (None, False, "vision"),
            "enable_moe_block": (False, None),
            "per_layer_config": (),
        },
        defaults={
            **GEMMA_DEFAULTS,
            "sliding_window": 512,
            "global_head_dim": 512,
            "hidden_size_per_layer_input": 256,
            "vocab_size_per_layer_input": 262_144,
            "num_kv_shared_layers": 0,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
            },
        },
    ),
    "GraniteForCausalLM": Architecture(
        "granite",
        "Granite 3",
        **ALL_BIASES,
        scales=GRANITE_SCALES,
        defaults=GRANITE_DEFAULTS,
    ),
    "SeedOssForCausalLM": Architecture(
        "seed_oss",
        "Seed-OSS",
        qkv_bias="attention_bias",
        out_bias="attention_out_bias",
        mlp_bias="mlp_bias",
        defaults={"head_dim": 128, "attention_bias": True, "num_key_value_heads": 8},
    ),
    "HunYuanDenseV1ForCausalLM": Architecture(
        "hunyuan_v1_dense",
        "Hunyuan dense",
        **ATTENTION_BIASES,
        head_norms=HeadNorms(("query_layernorm", "key_layernorm"), after_rotation=True),
        defaults={"rms_norm_eps": 1e-5},
    ),
    "CwmForCausalLM": Architecture(
        "cwm",
        "CWM",
        mlp_bias="mlp_bias",
        windows=Windows("typed", period=4, first=0),
        defaults={
            "head_dim": 128,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "sliding_window": 8192,
            "rope_theta": 1e6,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e6,
                "factor": 16.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "Phi3ForCausalLM": Architecture(
        "phi3",
        "Phi-3, Phi-4",
        windows=Windows("all"),
        rotates_part=True,
        fused=frozenset(("qkv", "gate_up")),
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    ),
    "Olmo2ForCausalLM": Architecture(
        "olmo2",
        "OLMo 2",
        **ATTENTION_BIASES,
        norms=BEHIND,
        head_norms=HeadNorms(whole_rows=True),
        defaults={"rms_norm_eps": 1e-5},
    ),
    "Olmo3ForCausalLM": Architecture(
        "olmo3",
        "OLMo 3",
        **ATTENTION_BIASES,
        norms=BEHIND,
        head_norms=HeadNorms(whole_rows=True),
        windows=Windows("typed", period=4),
        ropes_by_type=True,
        defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096, "rope_theta": 5e5, "rope_local_base_freq": 5e5},
    ),
    "Exaone4ForCausalLM": Architecture(
        "exaone4",
        "EXAONE 4",
        norms=BEHIND,
        head_norms=HeadNorms(),
        windows=Windows("typed", period=4, option="sliding_window_pattern"),
        rotates="sliding",
        defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096, "num_key_value_heads": 32},
    ),
    "Glm4ForCausalLM": Architecture(
        "glm4",
        "GLM-4-0414",
        qkv_bias="attention_bias",
        norms=GLM_NORMS,
        rotates_part=True,
        interleaved=True,
        fused=frozenset(("gate_up",)),
        defaults={
            "attention_bias": True,
            "head_dim": 128,
            "num_key_value_heads": 2,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1.5625e-07,
        },
    ),
    "ArceeForCausalLM": Architecture(
        "arcee", "AFM", **ALL_BIASES, gated=False, defaults={"hidden_act": "relu2", "rms_norm_eps": 1e-5}
    ),
    "ApertusForCausalLM": Architecture(
        "apertus",
        "Apertus",
        **ATTENTION_BIASES,
        norms=APERTUS_NORMS,
        head_norms=HeadNorms(),
        gated=False,
        defaults={
            "hidden_act": "xielu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 12e6,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 12e6,
                "factor": 8.0,
                "original_max_position_embeddings": 8192,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        },
    ),
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
        norms=BlockNorms("operator_norm", "", "ffn_norm", ""),
        head_norms=HeadNorms(("q_layernorm", "k_layernorm")),
        recurrent=Recurrent("conv", "conv", ("conv",), attends="full_attn_idxs"),
        names=LayerNames(out="out_proj", mlp="feed_forward", gate="w1", up="w3", down="w2", last_norm="embedding_norm"),
        eps_option="norm_eps",
        aliases={"tie_embedding": "tie_word_embeddings", "block_ff_dim": "intermediate_size"},
        defaults={
            "norm_eps": 1e-5,
            "num_key_value_heads": 8,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
            "conv_bias": False,
            "conv_L_cache": 3,
            "block_multiple_of": 256,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": True,
        },
    ),
    "GraniteMoeHybridForCausalLM": Architecture(
        "granitemoehybrid",
        "Granite 4, without experts",
        **ATTENTION_BIASES,
        rotates="named",
        recurrent=Recurrent("mamba", "mamba", ("mamba", "linear_attention")),
        names=LayerNames(mlp="shared_mlp", gate_up="input_linear", down="output_linear"),
        fused=frozenset(("gate_up",)),
        inner_option="shared_intermediate_size",
        scales=Scales(
            "embedding_multiplier", "residual_multiplier", "attention_multiplier", logits_divisor="logits_scaling"
        ),
        aliases={"layers_block_type": "layer_types"},
        only={"num_local_experts": (0,)},
        defaults={
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "logits_scaling": 1.0,
            "num_local_experts": 8,
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
        mixture=Mixture(
            module="block_sparse_moe",
            router="router.layer",
            counts=("num_local_experts",),
            inner="intermediate_size",
            scores="chosen",
            renamed=((".router.layer.", ".router."),),
        ),
        defaults={**GRANITE_DEFAULTS, "num_local_experts": 8, "num_experts_per_tok": 2},
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
