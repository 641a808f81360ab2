"""Counts in a config that cannot be right, told by the headers of the weights before anything is made of them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quasar_core.errors import QuasarError
from quasar_core.store.model_config import read_config
from quasar_core.store.safetensors_header import read_headers

# Each layer stores one tensor at least, each expert one weight for every input.
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "depth")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "moe_num_experts")


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
