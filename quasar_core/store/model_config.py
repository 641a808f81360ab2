"""A model's config.json, with the options that are read here of the types and signs that they must have."""

from pathlib import Path
from typing import Any

from quasar_core.errors import QuasarError
from quasar_core.files import read_json
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


def _check(options: dict[str, Any], where: str) -> None:
    for name, kind in _TYPES.items():
        build(kind, options.get(name), where + name)
    for name in _SIZES:
        size = options.get(name)
        build(_SIZE, size, where + name)
        if isinstance(size, int) and size < 1:
            raise ValueError(f"{where}{name} must be at least 1, not {size}")
