"""Load a pair and decode with it; nothing is imported that only quantizing and measuring need, to start fast."""

from pathlib import Path
from typing import Any

from quasar_core.checkpoint.adapter import merge_adapter as merged_folder
from quasar_core.config import LoadOptions
from quasar_core.decode.answering import Answering
from quasar_core.decode.drafts.draft_memory import forget_answers
from quasar_core.decode.drafts.draft_texts import forget_texts, read_texts
from quasar_core.decode.generator import Generator
from quasar_core.decode.text import encode_prompt
from quasar_core.decode.traced import trace_of
from quasar_core.files import absolute
from quasar_core.kernels.threads import describe_threads, use_threads
from quasar_core.load_pair import find_pair_files, load
from quasar_core.models.pair import Encode, Pair
from quasar_core.models.weights.compressed_files import forget_copies
from quasar_core.records import Progress, no_progress
from quasar_core.store import resolve_model
from quasar_core.trace import refuse_foreign_trace, write_trace

__all__ = [
    "Answering",
    "Encode",
    "Generator",
    "Pair",
    "describe_threads",
    "encode_prompt",
    "find_pair_files",
    "forget_kept",
    "load",
    "load_pair",
    "merge_adapter",
    "read_texts",
    "refuse_foreign_trace",
    "trace_of",
    "use_threads",
    "write_trace",
]


def load_pair(
    model: str | None = None, verifier: str | None = None, *, progress: Progress = no_progress, **options: Any
) -> Pair:
    """Load a pair by the fields of `LoadOptions`; see `quasar_core/load_pair.py`."""
    return load(LoadOptions(model, verifier, **options), progress)


def merge_adapter(model: str, adapter: Path, progress: Progress = no_progress) -> str:
    """The folder of `model` with a LoRA merged into it, made once; QuasarError where they do not fit."""
    return str(merged_folder(resolve_model(model).folder, absolute(adapter), progress))


def forget_kept() -> tuple[int, int, int]:
    """Remove answers that were kept for drafts, indexes of texts, copies of models in 12 bits; how many of each."""
    return forget_answers(), forget_texts(), forget_copies()
