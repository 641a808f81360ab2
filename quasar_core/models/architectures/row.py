"""A row of the table of architectures: where one departs from Llama's skeleton, and what several rows share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Scores = Literal["softmax", "chosen", "sigmoid"]
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
        """Names of the norms that a block has."""
        every = (self.before_attention, self.behind_attention, self.before_mlp, self.behind_mlp)
        return tuple(name for name in every if name)


BEFORE = BlockNorms()
BEHIND = BlockNorms("", "post_attention_layernorm", "", "post_feedforward_layernorm")


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms of queries and keys: of each head, or of all heads as one row; before the rotation, or after it."""

    names: tuple[str, str] = ("q_norm", "k_norm")
    whole_rows: bool = False
    after_rotation: bool = False
    option: str = ""  # that says whether there are any; "" is yes
    of_values: bool = False  # each value's too, without a weight
    weighted: bool = True  # else none has a weight


@dataclass(frozen=True)
class Windows:
    """Which layers slide.

    `kind`: none; all; those of `layer_types`, or from `max_window_layers` on, where `use_sliding_window` is on
    ("listed"); those of `layer_types`, or all but one layer in every `period` ("typed").
    """

    kind: Literal["none", "all", "listed", "typed"] = "none"
    period: int = 0  # of the layers that see everything; 0: there are none
    first: int = -1  # of them; −1 is the period's last
    from_last: bool = False  # counted from the last layer
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
    mix_gate: str = ""  # what gates attention's mix, where a layer of its own does


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
    queries: str = ""  # beside 1 ÷ √D
    logits: str = ""
    logits_divisor: str = ""


@dataclass(frozen=True)
class Beside:
    """Names in the files of what experts have that stand beside an MLP, whose inputs and outputs are normed apart."""

    mlp_out_norm: str = "post_feedforward_layernorm_1"
    norm: str = "pre_feedforward_layernorm_2"
    out_norm: str = "post_feedforward_layernorm_2"
    router_scale: str = "router.scale"  # of what the router reads, which is normed; times 1 ÷ √H
    factors: str = "router.per_expert_scale"  # of each expert's shares


@dataclass(frozen=True)
class Mixture:
    """Names of a mixture's tensors in the files below its block, and its options in config.json; "" is none.

    `scores` are the shares of the chosen: of a softmax over all experts, over the chosen ones, or sigmoids.
    """

    module: str = "mlp"  # "" is the block
    beside: Beside | None = None  # the MLP; else in its place
    option: str = ""  # that says whether there are any; "" is yes
    chosen: str = "num_experts_per_tok"
    router: str = "gate"  # within the module
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")  # of experts.N
    counts: tuple[str, ...] = ("num_experts", "num_local_experts")  # options with the number of experts
    usual_count: int = 0  # where config.json has none of these
    inner: str = "moe_intermediate_size"
    scores: Scores = "softmax"
    normalised: str = ""  # the option that lets the shares of a token sum to 1
    added: float = 1e-20  # to the sum that these shares are divided by
    scale: str = ""  # of the shares
    correction: str = ""  # stored numbers that count where experts are chosen, not in their shares
    correction_option: str = ""  # that says whether there are any; "" is yes
    shared: str = ""  # an expert of every token
    shared_mlp: bool = False  # which is the block's MLP, by its own names
    shared_inner: str = ""
    shared_count: str = ""  # so many times an expert's size
    shared_gate: str = ""  # its share is the sigmoid of this product; else 1
    first: str = ""  # the first block that has experts
    step: str = ""  # every so many blocks have some
    without: str = ""  # a list of blocks that have none
    renamed: tuple[tuple[str, str], ...] = ()  # parts of names, as transformers 5 may write them


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
    centred_last_norm: bool = True  # that before the head too, where others are
    norms_embedding: bool = False  # without a weight
    head_norms: HeadNorms | None = None
    windows: Windows = Windows()
    # Layers: all; by `no_rope_layers`; where `layer_rope_theta` is not 0; sliding where any are; all or none by
    # `position_embedding_type`.
    rotates: Literal["all", "marked", "thetas", "sliding", "named"] = "all"
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
    behind_eps_option: str = ""  # of norms behind attention and MLP, where theirs is another
    aliases: Mapping[str, str] = field(default_factory=dict)  # other names of options, which count before
    mixture: Mixture | None = None  # of experts, in the place of the MLPs of some blocks or beside them
    further_blocks: str = ""  # the option with the number of stored blocks behind the last one, which do not run
    blocks_differ: bool = False  # as Gemma 4's do: in head size, heads, MLP, in whose keys and values they read
    only: Mapping[str, Any] = field(default_factory=dict)  # options of which the decoder has but one value
    defaults: Mapping[str, Any] = field(default_factory=dict)


ALL_BIASES: dict[str, Any] = {"qkv_bias": "attention_bias", "out_bias": "attention_bias", "mlp_bias": "mlp_bias"}
ATTENTION_BIASES: dict[str, Any] = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
GRANITE_SCALES = Scales(
    "embedding_multiplier", "residual_multiplier", "attention_multiplier", logits_divisor="logits_scaling"
)
GRANITE_DEFAULTS: dict[str, Any] = {
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "logits_scaling": 1.0,
}
