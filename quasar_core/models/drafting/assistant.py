"""Load the small model that drafts for a target, and refuse one of another vocabulary."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from quasar_core.errors import UsageError
from quasar_core.models.base import CausalLM
from quasar_core.models.loading import load_models
from quasar_core.models.pair import load_tokenizer
from quasar_core.records import Progress, no_progress


@dataclass(frozen=True)
class LoadedAssistant:
    """A model that drafts, and the choices made while loading it."""

    model: CausalLM
    notes: tuple[str, ...]


def load_assistant(
    folder: Path,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    compress: bool | None = None,
    progress: Progress = no_progress,
) -> LoadedAssistant:
    """Load the model of a folder as a target is; UsageError where its tokens are not those of `tokenizer`."""
    check_vocabulary(name, load_tokenizer(folder, trust_remote_code).get_vocab(), tokenizer.get_vocab())
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "compress": compress}
    models = load_models(folder, None, device, dtype, **options, progress=progress)
    assert models.target is not None
    if models.target.vocab_size < len(tokenizer):
        raise UsageError(f"--assistant {name} has {models.target.vocab_size:,} rows for {len(tokenizer):,} tokens.")
    return LoadedAssistant(models.target, tuple(f"{note} (assistant)" for note in models.notes))


def check_vocabulary(name: str, own: dict[str, int], targets: dict[str, int]) -> None:
    """UsageError that names a token where two vocabularies differ."""
    differing = sorted(token for token in own.keys() | targets.keys() if own.get(token) != targets.get(token))
    if differing:
        raise UsageError(
            f"--assistant {name} has another vocabulary than the model that it drafts for: {len(differing):,} tokens "
            f"differ, such as {differing[0]!r}."
        )
