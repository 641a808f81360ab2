"""Read the rotary embeddings that a config.json asks for, by the older names of its options and by the newer."""

from collections.abc import Mapping
from math import inf
from typing import Any

from quasar_core.models.architectures.row import Architecture
from quasar_core.models.rope import ROPE_KINDS, RopeConfig

LAYER_TYPES = ("full_attention", "sliding_attention")
# What scalings need and cannot do without.
ROPE_OPTIONS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
_NUMBER = float | None
ROPE_TYPES: dict[str, Any] = {
    "rope_type": str | None,
    "type": str | None,
    "truncate": bool | None,
    **dict.fromkeys(("short_factor", "long_factor"), list[float] | None),
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
            "alpha",
            "llama_4_scaling_beta",
        ),
        _NUMBER,
    ),
}


def read_ropes(row: Architecture, options: Mapping[str, Any], head_sizes: tuple[int, int]) -> tuple[RopeConfig, ...]:
    """The rotary embeddings: of all layers, or of full layers and of sliding ones, whose heads have these sizes."""
    if not row.ropes_by_type:
        return (_rope(row, options, _flat_options(options), options.get("rope_theta"), head_sizes[0]),)
    thetas = options.get("rope_theta"), options.get("rope_local_base_freq")
    return tuple(
        _rope(row, options, rope, theta, head_size)
        for rope, theta, head_size in zip(_options_by_type(options), thetas, head_sizes, strict=True)
    )


def why_not_rope(row: Architecture, options: Mapping[str, Any]) -> str | None:
    """What a config asks of its rotary embeddings that the decoder does not do; None where it does all."""
    flat = _flat_options(options)
    nested = any(isinstance(value, Mapping) for value in flat.values())
    if not row.ropes_by_type:
        if nested:
            return "its rotary embedding is the same in all layers, and config.json has one per layer type"
        return _why_not_one(row, options, flat)
    if options.get("rope_parameters") and not any(kind in options["rope_parameters"] for kind in LAYER_TYPES):
        return "its rotary embeddings differ between layer types, and config.json has one for all"
    for rope in _options_by_type(options):
        reason = _why_not_one(row, options, rope)
        if reason or _kind(row, rope) == "dynamic":
            return reason or "it has no dynamic rotary embedding that differs between layer types"
    return None


def _why_not_one(row: Architecture, options: Mapping[str, Any], rope: Mapping[str, Any]) -> str | None:
    part, kind = _rotated_part(rope, options), _kind(row, rope)
    if kind == "proportional" and row.blocks_differ:
        return None
    if part != 1 and not row.rotates_part:
        return "it rotates whole heads, and config.json has a partial_rotary_factor"
    if not 0 < part <= 1:
        return f"its partial_rotary_factor is {part}"
    if kind not in ROPE_KINDS or (kind == "longrope" and row.model_type != "phi3"):
        return f"it has no rope scaling of the type {kind}"
    needed = (*ROPE_OPTIONS.get(kind, ()), *(("llama_4_scaling_beta",) if row.grows_queries else ()))
    needed += ("original_max_position_embeddings",) if row.grows_queries else ()
    rope = _with_trained_positions(rope, options)
    missing = [key for key in needed if rope.get(key) is None]
    if missing:
        return f"its {kind} rope scaling has no {missing[0]}"
    return _why_not_factors(options, rope, part) if kind == "longrope" else None


def _why_not_factors(options: Mapping[str, Any], rope: Mapping[str, Any], part: float) -> str | None:
    """What is wrong with longrope's factors: there must be a positive one for each frequency."""
    size = options.get("head_dim") or options["hidden_size"] // options["num_attention_heads"]
    for key in ("short_factor", "long_factor"):
        if len(rope[key]) != int(size * part) // 2 or not all(0 < factor < inf for factor in rope[key]):
            return f"its {key} is not {int(size * part) // 2} positive numbers"
    return None


def _with_trained_positions(rope: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """A scaling's options; the length of training may stand beside them."""
    name = "original_max_position_embeddings"
    return {**rope, **({name: options[name]} if name in options else {})}


def _rope(
    row: Architecture, options: Mapping[str, Any], rope: Mapping[str, Any], theta: float | None, head_size: int
) -> RopeConfig:
    rope = _with_trained_positions(rope, options)
    return RopeConfig(
        _kind(row, rope),
        float(rope.get("rope_theta") or theta or 10_000.0),
        head_size,
        options["max_position_embeddings"],
        options=rope,
        rotated=head_size if _kind(row, rope) == "proportional" else int(head_size * _rotated_part(rope, options)),
        interleaved=row.interleaved,
    )


def _flat_options(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Scaling options by the older name, then by the newer."""
    return options.get("rope_scaling") or options.get("rope_parameters") or {}


def _options_by_type(options: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Options of full layers, which alone take the older ones of a scaling; and of sliding layers."""
    given = options.get("rope_parameters") or {}
    full, sliding = (given.get(kind) or {} for kind in LAYER_TYPES)
    return {**full, **(options.get("rope_scaling") or {})}, sliding


def _rotated_part(rope: Mapping[str, Any], options: Mapping[str, Any]) -> float:
    return float(rope.get("partial_rotary_factor", options.get("partial_rotary_factor")) or 1)


def _kind(row: Architecture, rope: Mapping[str, Any]) -> str:
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    if kind == "dynamic" and row.model_type == "hunyuan_v1_dense" and rope.get("alpha"):
        return "alpha"  # a stretched theta that no text's length changes
    return {"su": "longrope", "yarn": "longrope"}.get(kind, kind) if row.model_type == "phi3" else kind
