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
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise QuasarError(f"The tokenizer in {folder} could not be loaded: {first}") from error


def context_limit(folder: Path) -> int:
    """Positions that the model was made for."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    return int(config.max_position_embeddings)


def end_of_text_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that ends an answer: of the generation config, else of the model's config, else the tokenizer's."""
    generation = folder / "generation_config.json"
    stored = [read_json(path) for path in (generation, folder / "config.json") if path.exists()]
    for ids in (*(content.get("eos_token_id") for content in stored), tokenizer.eos_token_id):
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    return frozenset()
