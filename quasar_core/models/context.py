"""The longest context that a model's config allows."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from quasar_core.errors import QuasarError
from quasar_core.models.weights.lean_weights import why_folder_not_lean
from quasar_core.store.model_config import read_text_config

_OPTIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "n_ctx")
UNLIMITED = 2**31 - 1  # positions of a model whose config names no limit, such as one without position embeddings


def position_limit(config: Any) -> int | None:
    """The limit that a text model's config names; None for one that names none."""
    for option in _OPTIONS:
        limit = getattr(config, option, None)
        if isinstance(limit, int) and not isinstance(limit, bool):
            if limit < 1:
                raise QuasarError(f"config.json has {limit} for {option}: a model has one position at least.")
            return limit
    return None


def context_limit(folder: Path, trust_remote_code: bool = False) -> int:
    """Positions that the model of a folder was made for; `UNLIMITED` where its config does not say.

    What a config leaves out, and any option of a model that is not our own decoder's, transformers' config knows.
    """
    options = read_text_config(folder)
    if "max_position_embeddings" not in options or why_folder_not_lean(folder) is not None:
        from quasar_core.models.hf.skeleton import read_model_config

        return position_limit(read_model_config(folder, trust_remote_code).get_text_config()) or UNLIMITED
    return position_limit(SimpleNamespace(**options)) or UNLIMITED
