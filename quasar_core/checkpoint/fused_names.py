"""Names of layers as vLLM and SGLang ask for them: of several layers as one product, and of others under other names.

Both multiply by q, k and v at once, and by gate and up: they ask the rules of `dynamic` for the fused product's name,
and read its parts at that one width. vLLM has other names than the files for some layers (`_asked`).
"""

import re
from collections.abc import Mapping, Sequence

MIX_GATE = ".self_attn.gate_proj"  # of Muse Glimmer's attention, which is no MLP's
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}


def fused_name(name: str) -> str | None:
    """The product that vLLM and SGLang make of a layer and others: …self_attn.qkv_proj of …self_attn.q_proj."""
    before, dot, last = name.rpartition(".")
    if name.endswith(MIX_GATE):
        return None
    return next((f"{before}{dot}{fused}" for fused, parts in FUSED.items() if last in parts), None)


def name_in_vllm(name: str) -> str:
    """What it asks the rules for: it has other names for Granite's Mamba and the gate of Muse Glimmer's attention."""
    return name.replace(".mamba.", ".mixer.").replace(MIX_GATE, ".self_attn.output_gate_proj")


def listed_layers(names: Sequence[str]) -> list[str] | None:
    """What `modules_in_block_to_quantize` must list so that vLLM reads the codes of these layers.

    None where it finds them by itself: without the list it asks the files for the names of `_asked`.
    """
    is_phi = _is_phi(names)
    asked = sorted({name for layer in names for name in _asked(layer, is_phi)})
    return [*names, *asked] if asked else None


def unnamed_layers(names: Sequence[str], listed: frozenset[str]) -> frozenset[str]:
    """Layers and fused products whose codes vLLM leaves unread, and then finds no place for."""
    is_phi = _is_phi(names)
    asked = {name: _asked(name, is_phi) for name in names if not (is_phi and name.endswith(".gate_up_proj"))}
    unread = (name for name, needed in asked.items() if any(other not in listed for other in needed))
    return frozenset(fused_name(name) or name for name in unread)


def _is_phi(names: Sequence[str]) -> bool:
    """Whose class is made for layers that are stored as one, and asks under their own names."""
    return any(name.endswith(".qkv_proj") for name in names)


def _asked(name: str, is_phi: bool) -> tuple[str, ...]:
    """Names that no file has, by which vLLM asks whether a layer has codes."""
    before, _, last = name.rpartition(".")
    if last == "gate_up_proj":
        return tuple(f"{before}.{part}" for part in FUSED[last])
    if is_phi and last in FUSED["gate_up_proj"]:
        return (f"{before}.gate_up_proj",)
    return (name_in_vllm(name),) if ".mamba." in name else ()  # Muse Glimmer's class renames what the files have


def dynamic_rules(others: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """`dynamic` for layers of another width than the usual one, under their own names and under fused ones.

    Layers of one fused product have one width.
    """
    rules = {name: dict(width) for name, width in others.items()}
    rules |= {name_in_vllm(name): dict(width) for name, width in others.items()}
    rules |= {fused: dict(width) for name, width in others.items() if (fused := fused_name(name))}
    return {f"{re.escape(name)}$": width for name, width in rules.items()}
