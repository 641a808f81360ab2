"""Read a model's config.json, and refuse options of a wrong type or sign and counts that its files cannot hold."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quasar_core.errors import QuasarError
from quasar_core.files import read_json
from quasar_core.store.safetensors_header import TensorEntry, read_headers
from quasar_core.store.text_part import has_text_part, text_name, text_part
from quasar_core.typed import build

_SIZE: Any = int | list | None
_TYPES: dict[str, Any] = {
    "architectures": list[str] | None,
    "model_type": str | None,
    "dtype": str | None,
    "torch_dtype": str | None,
    "auto_map": dict | None,
    "text_config": dict | None,
    "quantization_config": dict | None,
}
# Some architectures have one for each layer.
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
# Each layer stores one tensor at least, each expert one weight for every input.
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "depth")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "moe_num_experts")


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json; QuasarError if it is missing, is no JSON object, or holds an option that cannot be."""
    path = folder / "config.json"
    config = read_json(path)
    try:
        _check(config, "")
        if config.get("text_config"):
            _check(config["text_config"], "text_config.")
    except ValueError as error:
        raise QuasarError(f"{path} is not a model's config: {error}.") from error
    return config


def read_text_config(folder: Path) -> dict[str, Any]:
    """The config.json of the text part alone, where the model is multimodal (`text_part.py`)."""
    return text_part(read_config(folder))


def text_entries(folder: Path) -> dict[str, TensorEntry]:
    """The tensors of a folder's text part as they are stored, by the names that a text model has, sorted."""
    entries = read_headers(folder)
    prefixed = any(text_name(entry.name) not in (None, entry.name) for entry in entries)
    if not prefixed or not has_text_part(read_config(folder)):
        return {entry.name: entry for entry in entries}
    found: dict[str, TensorEntry] = {}
    for entry in entries:
        name = text_name(entry.name)
        if name is not None and found.setdefault(name, entry) is not entry:
            raise QuasarError(f"{folder} holds {name} twice: as {found[name].name} and as {entry.name}.")
    return {name: found[name] for name in sorted(found)}


def read_text_headers(folder: Path) -> list[TensorEntry]:
    """The headers of a folder's text part, under the names that a text model has."""
    return [replace(entry, name=name) for name, entry in text_entries(folder).items()]


def _check(options: dict[str, Any], where: str) -> None:
    for name, kind in _TYPES.items():
        build(kind, options.get(name), where + name)
    for name in _SIZES:
        size = options.get(name)
        build(_SIZE, size, where + name)
        if isinstance(size, int) and size < 1:
            raise ValueError(f"{where}{name} must be at least 1, not {size}")


def check_counts(folder: Path) -> None:
    """QuasarError for more layers or experts than the model's files can hold."""
    entries = read_headers(folder)
    bounds = {
        **dict.fromkeys(_LAYER_COUNTS, (len(entries), "tensors")),
        **dict.fromkeys(_EXPERT_COUNTS, (sum(entry.size for entry in entries) // 64, "blocks of 64 bytes")),
    }
    for option, count in _integers(read_config(folder)):
        most, unit = bounds.get(option, (count, ""))
        if count > most:
            raise QuasarError(
                f"config.json in {folder} has {count:,} for {option}, and the files hold {most:,} {unit} altogether."
            )


def _integers(content: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Options that are whole numbers, those of sub-configs too."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _integers(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield key, value
