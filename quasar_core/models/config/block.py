"""The layout of a decoder's blocks, as a config.json has it: windows, rotations, sizes, and whose states they read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quasar_core.models.architectures.row import Architecture
from quasar_core.models.config.mixture import sparse_blocks
from quasar_core.models.config.recurrence import RecurrenceConfig, read_recurrence, why_not_recurrence
from quasar_core.models.config.rope import LAYER_TYPES

SLIDING = "sliding_attention"
ATTENDING = ("full_attention", "attention")  # beside recurrent layers
PER_LAYER = {"head_dim": "head_size", "num_key_value_heads": "kv_heads"}  # fields of blocks by options


@dataclass(frozen=True)
class BlockConfig:
    """What may differ from block to block."""

    window: int | None  # positions that it sees, its own included; None is all of them
    rope: int | None  # which of the model's rotary embeddings; None: it does not rotate
    head_size: int
    kv_heads: int
    inner: int  # of the MLP
    states_of: int  # the block whose keys and values it reads: itself, or an earlier one
    sparse: bool = False  # it has experts, in the place of its MLP or beside it
    values_are_keys: bool = False  # before norm and rotation
    recurrence: RecurrenceConfig | None = None  # in place of attention
    sinks: int = 0  # the text's first positions, which it sees beside those of its window


def read_blocks(row: Architecture, options: Mapping[str, Any]) -> tuple[BlockConfig, ...]:
    marks = _marked_layers(row, options)
    windows = _windows(row, options, marks)
    in_use = options.get("sliding_window") is not None
    rotates = marks if row.rotates != "sliding" else tuple(w is not None or not in_use for w in windows)
    if row.rotates == "named":
        rotates = (options.get("position_embedding_type") == "rope",) * len(windows)
    heads = options.get("num_key_value_heads") or options["num_attention_heads"]
    alone = None if row.mixture and row.mixture.beside else row.mixture
    blocks = tuple(
        BlockConfig(
            window=window,
            rope=(int(row.ropes_by_type and window is not None) if rotating else None),
            head_size=head_size_of(options),
            kv_heads=heads,
            inner=options[alone.inner] if alone and sparse else inner_size_of(row, options),
            states_of=index,
            sparse=sparse,
        )
        for index, (window, rotating, sparse) in enumerate(
            zip(windows, rotates, sparse_blocks(row.mixture, options), strict=True)
        )
    )
    if row.recurrent is not None:
        return recurrent_blocks(row, options, blocks)
    return differing_blocks(options, blocks) if row.blocks_differ else blocks


def differing_blocks(options: Mapping[str, Any], blocks: Sequence[BlockConfig]) -> tuple[BlockConfig, ...]:
    """Gemma 4's blocks: full layers of heads of their own, whose keys may be values; last ones that share states."""
    own, count = options.get("per_layer_config"), len(blocks)
    first_sharing = count - (options.get("num_kv_shared_layers") or 0)
    equal = bool(options.get("attention_k_eq_v"))
    heads = options.get("num_global_key_value_heads") if equal else None
    found: list[BlockConfig] = []
    for index, block in enumerate(blocks):
        changes: dict[str, Any] = {}
        if own is None and block.window is None:
            changes = {"head_size": options["global_head_dim"], "kv_heads": heads or block.kv_heads}
        elif own is not None:
            given = {int(name): changed for name, changed in own.items()}.get(index, {})
            changes = {field: given[name] for name, field in PER_LAYER.items() if name in given}
        changes["values_are_keys"] = equal and block.window is None
        if index >= first_sharing:
            changes["states_of"] = max(i for i in range(first_sharing) if blocks[i].window == block.window)
            changes["inner"] = block.inner * (2 if options.get("use_double_wide_mlp") else 1)
        found.append(replace(block, **changes))
    return tuple(found)


def recurrent_blocks(
    row: Architecture, options: Mapping[str, Any], blocks: Sequence[BlockConfig]
) -> tuple[BlockConfig, ...]:
    """The blocks of a recurrent model, some of them with a state in place of attention."""
    assert row.recurrent is not None
    shape, rule, count = read_recurrence(row.recurrent.kind, options), row.recurrent, len(blocks)
    types, attending = options.get("layer_types"), options.get(rule.attends) if rule.attends else None
    if types:
        chosen = [kind in rule.types for kind in types]
    elif rule.attends:
        chosen = [attending is not None and i not in attending for i in range(count)]
    else:
        period = options.get(rule.interval, rule.period) if rule.interval else rule.period
        chosen = [not period or (i + 1) % period != 0 for i in range(count)]
    changes: dict[str, Any] = {"recurrence": shape, "kv_heads": 0, "window": None, "rope": None}
    return tuple(replace(block, **changes) if is_one else block for block, is_one in zip(blocks, chosen, strict=True))


def inner_size_of(row: Architecture, options: Mapping[str, Any]) -> int:
    size = int(options[row.inner_option])
    if "block_auto_adjust_ff_dim" not in row.defaults or not options["block_auto_adjust_ff_dim"]:
        return size
    size, multiple = 2 * size // 3, int(options["block_multiple_of"])  # LFM2
    size = int((options.get("block_ffn_dim_multiplier") or 1) * size)
    return -(-size // multiple) * multiple


def head_size_of(options: Mapping[str, Any]) -> int:
    return int(options.get("head_dim") or options["hidden_size"] // options["num_attention_heads"])


def _marked_layers(row: Architecture, options: Mapping[str, Any]) -> tuple[bool, ...]:
    """Which layers rotate: all, or those that `no_rope_layers` marks with 1 (by default all but every fourth).

    Or those with a theta, by default all but every fourth from the last one on.
    """
    count = int(options["num_hidden_layers"])
    if row.rotates == "thetas":
        thetas = options.get("layer_rope_theta")
        return tuple(map(bool, thetas or ((count - 1 - i) % 4 for i in range(count))))
    if row.rotates != "marked":
        return (True,) * count
    interval = options.get("no_rope_layer_interval") or 4
    marks = options.get("no_rope_layers") or [(i + 1) % interval != 0 for i in range(count)]
    return tuple(map(bool, marks[:count]))


def _windows(row: Architecture, options: Mapping[str, Any], rotates: tuple[bool, ...]) -> tuple[int | None, ...]:
    """How many positions each layer sees, its own included; None is all of them."""
    window, count, kind = options.get("sliding_window"), int(options["num_hidden_layers"]), row.windows.kind
    if kind == "all":
        return (window,) * count
    if kind == "none" or (kind == "listed" and not options.get("use_sliding_window")):
        return (None,) * count
    types = options.get("layer_types")
    if types:
        slides = [kind == SLIDING for kind in types]
    elif kind == "typed":
        slides = _slides_by_period(row, options)
    elif row.rotates == "marked":
        slides = [not rotating for rotating in rotates]
    else:
        last, period = options.get("max_window_layers", 28), row.windows.period
        slides = [i >= last if not period else i < last and (i + 1) % period != 0 for i in range(count)]
    slides[-1] &= not row.blocks_differ  # Gemma 4's last layer sees everything, whatever is listed
    return tuple(window if sliding else None for sliding in slides)


def _slides_by_period(row: Architecture, options: Mapping[str, Any]) -> list[bool]:
    count, rule = int(options["num_hidden_layers"]), row.windows
    period = options.get(rule.option, rule.period) if rule.option else rule.period
    if not period:
        return [options.get("sliding_window") is not None] * count
    places = reversed(range(count)) if rule.from_last else range(count)
    return [i % period != rule.first % period for i in places]


def inputs_size_of(row: Architecture, options: Mapping[str, Any]) -> int:
    return int(options.get("hidden_size_per_layer_input") or 0) if row.blocks_differ else 0


def why_not_layers(row: Architecture, options: Mapping[str, Any]) -> str | None:
    """Lists of layers that contradict their number, and windows that the table's row does not have."""
    for key in ("layer_types", "no_rope_layers", "layer_rope_theta"):
        listed = options.get(key)
        if listed and len(listed) != options["num_hidden_layers"]:
            return f"config.json has {options['num_hidden_layers']} layers, and {len(listed)} {key}"
    types = set(options.get("layer_types") or ())
    if row.recurrent is not None:
        unknown = types - {*row.recurrent.types, *ATTENDING}
        reason = why_not_recurrence(row.recurrent.kind, options)
    else:
        unknown, reason = types - set(LAYER_TYPES), _why_not_windows(row, options, types)
    return f"it has no layers of the type {min(map(str, unknown))}" if unknown else reason


def _why_not_windows(row: Architecture, options: Mapping[str, Any], types: set[str]) -> str | None:
    window, kind = options.get("sliding_window"), row.windows.kind
    if kind == "none":
        narrow = window is not None and window < options["max_position_embeddings"]
        return f"{row.model_type} has no windows, and config.json has a sliding_window" if narrow else None
    if kind == "all":
        usual = "full_attention" if window is None else SLIDING
        return f"layers of {row.model_type} are of one type, and config.json lists others" if types - {usual} else None
    if kind == "typed" and row.windows.option and not isinstance(options.get(row.windows.option, 0), int | None):
        return None if types else f"its {row.windows.option} is no number"
    in_use = window is not None and (kind == "typed" or options.get("use_sliding_window"))
    if SLIDING in types and not in_use:
        return "config.json has sliding layers, and no window in use"
    return None


def why_not_differing(row: Architecture, options: Mapping[str, Any]) -> str | None:
    """What of blocks that differ contradicts itself, or is more than the decoder has."""
    own = options.get("per_layer_config") or {}
    if not all(str(name).isdecimal() and isinstance(given, Mapping) for name, given in own.items()):
        return "its per_layer_config is not one of layers by their numbers"
    unknown = {name for given in own.values() for name in given} - set(PER_LAYER)
    if unknown:
        return f"its per_layer_config has {min(unknown)}"
    windows = _windows(row, options, ())
    sharing = options.get("num_kv_shared_layers") or 0
    if not 0 <= sharing < len(windows) or set(windows) - set(windows[: len(windows) - sharing]):
        return f"{sharing} of its layers share keys and values, and not all of them with an earlier one"
    if inputs_size_of(row, options) and (options.get("vocab_size_per_layer_input") or 0) < options["vocab_size"]:
        return "some of its tokens have no inputs for each layer"
    sizes = {(block.rope, block.head_size) for block in read_blocks(row, options)}
    return "layers that rotate alike have heads of several sizes" if len(sizes) > len(dict(sizes)) else None
