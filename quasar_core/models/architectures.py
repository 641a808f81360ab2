"""The architectures that the lean decoder runs: one skeleton, a row of switches each.

A row says where an architecture departs from Llama's skeleton; a switch may name the option of config.json that sets
it. `docs/architectures.md` shows how to add one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

from quasar_core.errors import QuasarError
from quasar_core.models.rope import ROPE_KINDS, RopeConfig
from quasar_core.typed import build

Switch = bool | str  # or the option of config.json that says so
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
LAYER_TYPES = ("full_attention", "sliding_attention")
# What scalings need and cannot do without.
ROPE_OPTIONS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True)
class Architecture:
    """A row of the table. `defaults` are the options that hold where config.json does not name them."""

    model_type: str  # by which transformers chooses the class
    qkv_bias: Switch = False
    out_bias: Switch = False
    mlp_bias: Switch = False
    head_norms: bool = False  # RMS norms of each head's query and key
    windows: Literal["none", "all", "listed"] = "none"  # which layers slide: `sliding_window`, `layer_types`
    skips_rope: bool = False  # layers without positions: `no_rope_layers`
    defaults: Mapping[str, Any] = field(default_factory=dict)


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        "llama", qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias"
    ),
    "MistralForCausalLM": Architecture(
        "mistral", windows="all", defaults={"sliding_window": 4096, "num_key_value_heads": 8}
    ),
    "Qwen2ForCausalLM": Architecture(
        "qwen2", qkv_bias=True, windows="listed", defaults={"sliding_window": 4096, "num_key_value_heads": 32}
    ),
    "Qwen3ForCausalLM": Architecture(
        "qwen3",
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        head_norms=True,
        windows="listed",
        defaults={"head_dim": 128, "sliding_window": 4096, "num_key_value_heads": 32},
    ),
    "SmolLM3ForCausalLM": Architecture(
        "smollm3",
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias="mlp_bias",
        windows="listed",
        skips_rope=True,
        defaults={"rope_theta": 2e6, "tie_word_embeddings": True, "num_key_value_heads": 4},
    ),
    "PanguEmbeddedForCausalLM": Architecture("PanguEmbedded", qkv_bias="bias", out_bias="bias"),
}

# Options that transformers reads for any model, in its masks and caches, and the one value that the decoder has.
ONLY_VALUES: dict[str, Any] = {"is_causal": True, "attention_chunk_size": None, "per_layer_config": None}
# Options of the classes above that have no effect on a pass: training, files, generation, and names.
WITHOUT_EFFECT = frozenset(
    (
        "attention_dropout",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "transformers_version",
        "use_cache",
    )
)


# The types of the options of config.json that the decoder computes with.
_WHOLE, _NUMBER, _SWITCH = int | None, float | None, bool | None
_OPTION_TYPES: dict[str, Any] = {
    "vocab_size": int,
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "max_position_embeddings": int,
    "num_key_value_heads": _WHOLE,
    "head_dim": _WHOLE,
    "sliding_window": _WHOLE,
    "max_window_layers": _WHOLE,
    "no_rope_layer_interval": _WHOLE,
    "rms_norm_eps": _NUMBER,
    "rope_theta": _NUMBER,
    "partial_rotary_factor": _NUMBER,
    "tie_word_embeddings": _SWITCH,
    "attention_bias": _SWITCH,
    "mlp_bias": _SWITCH,
    "bias": _SWITCH,
    "use_sliding_window": _SWITCH,
    "layer_types": list[str] | None,
    "no_rope_layers": list[int] | None,
    "rope_scaling": dict | None,
    "rope_parameters": dict | None,
}
_ROPE_TYPES: dict[str, Any] = {
    "rope_type": str | None,
    "type": str | None,
    "truncate": _SWITCH,
    **dict.fromkeys(
        (
            "rope_theta",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
            "partial_rotary_factor",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
        ),
        _NUMBER,
    ),
}


@dataclass(frozen=True)
class DecoderConfig:
    """One model's sizes and switches, in the decoder's own words."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    eps: float
    max_positions: int
    tied: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    head_norms: bool
    windows: tuple[int | None, ...]  # of each layer; None sees everything
    rotates: tuple[bool, ...]  # of each layer
    rope: RopeConfig

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """From the content of config.json; QuasarError where the decoder does not run it."""
        obstacle = why_not_lean(config)
        if obstacle:
            raise QuasarError(f"The lean decoder does not run this model: {obstacle}.")
        name = config["architectures"][0]
        row = ARCHITECTURES[name]
        options = {**row.defaults, **config}
        heads = options["num_attention_heads"]
        rotates = _rotating_layers(row, options)
        return cls(
            architecture=name,
            vocab_size=options["vocab_size"],
            hidden_size=options["hidden_size"],
            intermediate_size=options["intermediate_size"],
            num_layers=options["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=options.get("num_key_value_heads") or heads,
            head_size=_head_size(options),
            eps=options.get("rms_norm_eps", 1e-6),
            max_positions=options["max_position_embeddings"],
            tied=options.get("tie_word_embeddings", False),
            qkv_bias=_is_on(row.qkv_bias, options),
            out_bias=_is_on(row.out_bias, options),
            mlp_bias=_is_on(row.mlp_bias, options),
            head_norms=row.head_norms,
            windows=_windows(row, options, rotates),
            rotates=rotates,
            rope=_rope(options),
        )


def why_not_lean(config: Mapping[str, Any]) -> str | None:
    """Why the lean decoder does not run a model with this config.json, or None where it does."""
    name = (config.get("architectures") or ["no architecture"])[0]
    if name not in ARCHITECTURES:
        return f"{name} is not in its table of architectures"
    missing = [key for key in REQUIRED if not config.get(key)]
    if missing:
        return f"config.json has no {missing[0]}"
    wrong = wrong_option(config)
    if wrong:
        return f"in its config.json {wrong}"
    row = ARCHITECTURES[name]
    options = {**row.defaults, **config}
    return _why_not_options(name, options) or _why_not_layers(row, options) or _why_not_rope(options)


def _why_not_options(name: str, options: Mapping[str, Any]) -> str | None:
    model_type = options.get("model_type", ARCHITECTURES[name].model_type)
    if model_type != ARCHITECTURES[name].model_type:
        return f"{name} is not of the model_type {model_type}"
    if options.get("hidden_act", "silu") not in ("silu", "swish"):
        return f"its MLP is gated by silu, not by {options['hidden_act']}"
    other = next((key for key, value in ONLY_VALUES.items() if options.get(key, value) != value), None)
    return f"it has no {other} of {options[other]}" if other else None


def wrong_option(options: Mapping[str, Any]) -> str | None:
    """What is wrong with the first option that is of another type, or no number of any use; None where none is."""
    try:
        _check_types(options, _OPTION_TYPES, "")
        for name in ("rope_scaling", "rope_parameters"):
            _check_types(options.get(name) or {}, _ROPE_TYPES, f"{name}.")
    except ValueError as error:
        return str(error)
    return None


def _check_types(options: Mapping[str, Any], types: Mapping[str, Any], where: str) -> None:
    for name, kind in types.items():
        if name in options:
            value = build(kind, options[name], where + name)
            if isinstance(value, float) and not 0 <= value < inf:
                raise ValueError(f"{where}{name} is {value}")


def _why_not_layers(row: Architecture, options: Mapping[str, Any]) -> str | None:
    """Lists of layers that contradict their number, and windows that the table's row does not have."""
    for key in ("layer_types", "no_rope_layers"):
        listed = options.get(key)
        if listed and len(listed) != options["num_hidden_layers"]:
            return f"config.json has {options['num_hidden_layers']} layers, and {len(listed)} {key}"
    types = set(options.get("layer_types") or ())
    if types - set(LAYER_TYPES):
        return f"it has no layers of the type {sorted(map(str, types - set(LAYER_TYPES)))[0]}"
    return _why_not_windows(row, options, types)


def _why_not_windows(row: Architecture, options: Mapping[str, Any], types: set[str]) -> str | None:
    window, slides = options.get("sliding_window"), "sliding_attention" in types
    if row.windows == "none":
        narrow = window is not None and window < options["max_position_embeddings"]
        return f"{row.model_type} has no windows, and config.json has a sliding_window" if narrow else None
    if row.windows == "all":
        usual = "full_attention" if window is None else "sliding_attention"
        return f"layers of {row.model_type} are of one type, and config.json lists others" if types - {usual} else None
    if slides and (window is None or not options.get("use_sliding_window")):
        return "config.json has sliding layers, and no window in use"
    return None


def _why_not_rope(options: Mapping[str, Any]) -> str | None:
    rope = _rope_options(options)
    if any(isinstance(value, Mapping) for value in rope.values()):
        return "its rotary embedding is the same in all layers, and config.json has one per layer type"
    if rope.get("partial_rotary_factor", options.get("partial_rotary_factor") or 1) != 1:
        return "it rotates whole heads, and config.json has a partial_rotary_factor"
    kind = _rope_kind(rope)
    if kind not in ROPE_KINDS:
        return f"it has no rope scaling of the type {kind}"
    missing = [key for key in ROPE_OPTIONS.get(kind, ()) if rope.get(key) is None]
    return f"its {kind} rope scaling has no {missing[0]}" if missing else None


def _rope(options: Mapping[str, Any]) -> RopeConfig:
    rope = dict(_rope_options(options))
    if "original_max_position_embeddings" in options:
        rope["original_max_position_embeddings"] = options["original_max_position_embeddings"]
    theta = rope.get("rope_theta") or options.get("rope_theta") or 10_000.0
    return RopeConfig(
        _rope_kind(rope), float(theta), _head_size(options), options["max_position_embeddings"], options=rope
    )


def _rope_options(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Scaling options by the older name, then by the newer."""
    return options.get("rope_scaling") or options.get("rope_parameters") or {}


def _rope_kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type", rope.get("type", "default")))


def _head_size(options: Mapping[str, Any]) -> int:
    return int(options.get("head_dim") or options["hidden_size"] // options["num_attention_heads"])


def _is_on(switch: Switch, options: Mapping[str, Any]) -> bool:
    return bool(options.get(switch, False)) if isinstance(switch, str) else switch


def _rotating_layers(row: Architecture, options: Mapping[str, Any]) -> tuple[bool, ...]:
    """Which layers rotate: all, or those that `no_rope_layers` marks with 1 (by default all but every fourth)."""
    count = int(options["num_hidden_layers"])
    if not row.skips_rope:
        return (True,) * count
    interval = options.get("no_rope_layer_interval") or 4
    marks = options.get("no_rope_layers") or [(i + 1) % interval != 0 for i in range(count)]
    return tuple(map(bool, marks[:count]))


def _windows(row: Architecture, options: Mapping[str, Any], rotates: tuple[bool, ...]) -> tuple[int | None, ...]:
    """How many positions each layer sees, its own included; None is all of them."""
    window, count = options.get("sliding_window"), int(options["num_hidden_layers"])
    if row.windows == "all":
        return (window,) * count
    if row.windows == "none" or not options.get("use_sliding_window"):
        return (None,) * count
    types = options.get("layer_types")
    if types:
        slides = [kind == "sliding_attention" for kind in types]
    elif row.skips_rope:
        slides = [not rotating for rotating in rotates]
    else:
        slides = [i >= options.get("max_window_layers", 28) for i in range(count)]
    return tuple(window if sliding else None for sliding in slides)
