"""A target and its verifier on one device, over one cache."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from quasar_core.errors import ContextFull, QuasarError, foreign_errors
from quasar_core.files import read_json, read_json_if_there
from quasar_core.models.base import CausalLM, KVCache
from quasar_core.records import FidelityReport
from quasar_core.typed import build

Encode = Callable[[PreTrainedTokenizerBase], Sequence[int]]  # makes a prompt's tokens


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
    successors_folder: Path | None = None  # a verifier's, which may hold successors for drafts to begin with
    measured: dict[str, Any] = field(default_factory=dict, repr=False)
    processors: Mapping[str, Any] = field(default_factory=dict)  # options of logits processors, by name
    assistant: CausalLM | None = None  # a smaller model that drafts
    assistant_fingerprint: str | None = None
    assistant_context: int | None = None  # tokens that it can follow
    head: Any = None  # the checkpoint's own, which predicts a further token, once a drafter has asked for it
    short: "Pair | None" = None  # the same with a verifier whose head knows some tokens, once `exact` has asked for it
    rolls_back: bool = True  # whether its cache can; else it generates plainly
    context_is_asked: bool = False  # whether --max-context made `max_context` less than the model's own
    fast: bool = False  # whether --fast lets a GPU's passes round by what passes beside a token

    @property
    def context_words(self) -> str:
        """What holds at most `max_context` tokens, for a sentence that says so."""
        return _context_words(self.context_is_asked)

    @property
    def rounds_alike(self) -> bool:
        """Whether the target rounds a token's logits alike whatever passes beside it.

        So do fast passes, to the last bit; in float32 what is left is too little to matter. PyTorch's products of one
        token and of several may differ in the last of 16 bits.
        """
        return self.dtype == torch.float32 or (getattr(self.target, "fast", None) is not None and not self.fast)

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


def refuse_long(prompt_ids: Sequence[int], limit: int, is_asked: bool) -> None:
    """ContextFull for a prompt that leaves no room for a token; `is_asked` says that --max-context set the limit."""
    if len(prompt_ids) >= limit:
        raise ContextFull(f"The prompt has {len(prompt_ids)} tokens, and {_context_words(is_asked)} holds {limit}.")


def _context_words(is_asked: bool) -> str:
    return "the context that --max-context allows" if is_asked else "the model's context"


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder."""
    try:
        with foreign_errors(f"The tokenizer in {folder} could not be loaded"):
            tokenizer = AutoTokenizer.from_pretrained(
                folder, config=_config_of_named(folder), local_files_only=True, trust_remote_code=trust_remote_code
            )
    except QuasarError:
        for path in sorted(folder.glob("tokenizer*.json")):
            read_json(path)  # one that is no JSON is named
        raise
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():
        raise QuasarError(f"{folder} holds no tokenizer: the one that transformers makes of it knows no text.")
    return tokenizer


def _config_of_named(folder: Path) -> PretrainedConfig | None:
    """What transformers asks a model's config where the tokenizer's class is named; None has it read the config.

    The classes of configs bring whole models and PyTorch's compiler with them, which takes longer than all else.
    """
    named = read_json_if_there(folder / "tokenizer_config.json") or {}
    asked = {
        name: value
        for name, value in (read_json_if_there(folder / "config.json") or {}).items()
        if name in ("model_type", "model_name") and isinstance(value, str)
    }
    if "model_type" not in asked or not isinstance(named.get("tokenizer_class"), str) or "auto_map" in named:
        return None
    return PretrainedConfig.from_dict({**asked, "_name_or_path": str(folder)})


def end_of_text_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that ends an answer: of the generation config, else of the model's config, else the tokenizer's."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        content = read_json_if_there(path) or {}
        text_config = content.get("text_config")
        for part in (content, text_config if isinstance(text_config, dict) else {}):
            if part.get("eos_token_id") is not None:
                return _token_ids(part["eos_token_id"], path)
    end = tokenizer.eos_token_id
    return frozenset() if end is None else frozenset([end])


def _token_ids(value: Any, path: Path) -> frozenset[int]:
    """The ids that one or a list of them name; QuasarError for anything else."""
    try:
        return frozenset(build(list[int], value if isinstance(value, list) else [value], "eos_token_id"))
    except ValueError as error:
        raise QuasarError(f"{path} names no tokens that end a text: {error}.") from error
