"""Keep the tokens of answers in quasar's own folder, for the drafts of later runs; only where the user asks for it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

from quasar_core.decode.drafts.draft_texts import tokenizer_digest
from quasar_core.errors import QuasarError, foreign_errors
from quasar_core.files import is_file, require_regular, written_whole
from quasar_core.store.folders import home

MOST_KEPT = 32_768  # tokens, the latest


def memory_file(tokenizer: PreTrainedTokenizerBase) -> Path:
    """Where answers in a tokenizer's tokens are kept: models of one tokenizer share them."""
    return home() / "drafts" / f"memory-{tokenizer_digest(tokenizer)}.safetensors"


def recall_answers(path: Path) -> tuple[list[int], str]:
    """The tokens that were kept, and a sentence; none where there is no file or it is damaged."""
    if not is_file(path):
        return [], "draft memory: empty so far"
    try:
        require_regular(path)
        ids = load_file(path)["ids"]
        if ids.dtype != np.int32 or ids.ndim != 1 or len(ids) > MOST_KEPT or (ids < 0).any():
            raise ValueError("it holds no tokens")
    except Exception:  # whatever safetensors raises for bytes that are none of its own
        return [], f"draft memory: begun anew, as {path} is damaged"
    return ids.tolist(), f"draft memory: {len(ids):,} tokens of earlier answers"


def keep_answers(path: Path, tokens: Sequence[int]) -> str:
    """Write the latest tokens, for the user alone to read; why that could not be, if so."""
    try:
        with foreign_errors(f"{path} could not be written"), written_whole(path) as partial:
            partial.touch(mode=0o600)
            save_file({"ids": np.array(tokens[-MOST_KEPT:], dtype=np.int32)}, partial)
            partial.chmod(0o600)
    except QuasarError as error:
        return f"draft memory: not kept: {error}".rstrip(".")
    return ""


def forget_answers() -> int:
    """Remove all answers that were kept, of every tokenizer; how many files there were."""
    kept = sorted((home() / "drafts").glob("memory-*.safetensors"))
    for path in kept:
        path.unlink(missing_ok=True)
    return len(kept)
