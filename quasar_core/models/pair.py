"""A target and its verifier on one device, over one cache."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from quasar_core.checkpoint.reader import read_json
from quasar_core.errors import QuasarError
from quasar_core.models.base import CausalLM, KVCache
from quasar_core.records import FidelityReport


@dataclass
class Pair:
    """What generating needs: models, tokenizer, limits, and the choices made while loading, each with its reason.

    The fingerprints identify the models' files; without them (None) nothing that is measured is kept on disk.
    `measured` holds what was measured of the loaded models, by their roles.
    """

    tokenizer: PreTrainedTokenizerBase
    target: CausalLM | None
    verifier: CausalLM | None
    target_name: str
    verifier_name: str | None
    max_context: int
    eos_ids: frozenset[int]
    device: torch.device
    dtype: torch.dtype
    fidelity: FidelityReport | None = None
    notes: list[str] = field(default_factory=list)
    target_folder: Path | None = None
    target_fingerprint: str | None = None
    verifier_fingerprint: str | None = None
    measured: dict[str, Any] = field(default_factory=dict, repr=False)
    processors: Mapping[str, Any] = field(default_factory=dict)  # options of logits processors, by name

    @property
    def primary(self) -> CausalLM:
        """The model that runs the prompt: the target where there is one."""
        model = self.target or self.verifier
        if model is None:
            raise QuasarError("Neither a target nor a verifier is loaded.")
        return model

    def new_cache(self, capacity: int) -> KVCache:
        """A cache that target and verifier share."""
        cache: KVCache = self.primary.new_cache(capacity)
        return cache


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [""])[0].rstrip(" :")
        raise QuasarError(f"The tokenizer in {folder} could not be loaded: {first}") from error
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():
        raise QuasarError(f"{folder} holds no tokenizer: the one that transformers makes of it knows no text.")
    return tokenizer


def context_limit(folder: Path) -> int:
    """Positions that the model was made for."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    return int(config.max_position_embeddings)


def end_of_text_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that ends an answer: of the generation config, else of the model's config, else the tokenizer's."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        content = read_json(path) if path.exists() else {}
        text_config = content.get("text_config")
        for part in (content, text_config if isinstance(text_config, dict) else {}):
            if part.get("eos_token_id") is not None:
                return _token_ids(part["eos_token_id"], path)
    end = tokenizer.eos_token_id
    return frozenset() if end is None else frozenset([end])


def _token_ids(value: Any, path: Path) -> frozenset[int]:
    """The ids that one or a list of them name; QuasarError for anything else."""
    ids = value if isinstance(value, list) else [value]
    if not all(type(one) is int for one in ids):  # a bool is none
        raise QuasarError(f"The eos_token_id of {path} must be a whole number or a list of them, not {value!r}.")
    return frozenset(ids)
