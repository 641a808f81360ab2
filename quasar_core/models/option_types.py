"""The types of the options of config.json that our own decoder computes with."""

from collections.abc import Mapping
from math import inf
from typing import Any

from quasar_core.typed import build

_WHOLE, _NUMBER, _SWITCH = int | None, float | None, bool | None
_TYPES: dict[str, Any] = {
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


def wrong_option(options: Mapping[str, Any]) -> str | None:
    """What is wrong with the first option that is of another type, or no number of any use; None where none is."""
    try:
        _check(options, _TYPES, "")
        for name in ("rope_scaling", "rope_parameters"):
            _check(options.get(name) or {}, _ROPE_TYPES, f"{name}.")
    except ValueError as error:
        return str(error)
    return None


def _check(options: Mapping[str, Any], types: Mapping[str, Any], where: str) -> None:
    for name, kind in types.items():
        if name in options:
            value = build(kind, options[name], where + name)
            if isinstance(value, float) and not 0 <= value < inf:
                raise ValueError(f"{where}{name} is {value}")
