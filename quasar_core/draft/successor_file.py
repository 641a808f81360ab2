"""Keep known successors in a verifier's folder, and read them.

The file is a safetensors file by another name: tools that load a folder read every `*.safetensors` there as weights.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

from quasar_core.draft.successors import MOST_CONTEXTS, WIDTH, KnownSuccessors
from quasar_core.errors import QuasarError, foreign_errors
from quasar_core.files import is_file, written_whole
from quasar_core.store.folders import SUCCESSORS


def write_successors(folder: Path, known: KnownSuccessors, text: str) -> Path:
    """Write the file, whole or not at all; `text` is what was counted, in words. Raises OSError."""
    with written_whole(folder / SUCCESSORS) as beside:
        tensors = {"contexts": known.contexts, "tokens": known.tokens, "odds": known.odds}
        whole = save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, {"text": text})
        beside.write_bytes(whole)  # `save_file` would let its owner alone read it
    return folder / SUCCESSORS


def read_successors(folder: Path, vocabulary: int) -> KnownSuccessors | None:
    """Read the successors of a model of so many tokens; None where the folder has none.

    Raises QuasarError, with a reason, for a file that is none of this model's.
    """
    path = folder / SUCCESSORS
    if not is_file(path):
        return None
    status = path.stat()
    return _read(path, vocabulary, (status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=2)
def _read(path: Path, vocabulary: int, written: tuple[int, int]) -> KnownSuccessors:
    """Read a file once, as it was `written`: every generator asks for it, and its contexts take 12 MB in Python."""
    with foreign_errors(f"{path} cannot be read"):
        tensors = load_file(path)
    wanted = {"contexts": (np.int64, 1), "tokens": (np.int32, 2), "odds": (np.uint8, 2)}
    if {name: (tensor.dtype.type, tensor.ndim) for name, tensor in tensors.items()} != wanted:
        raise QuasarError(f"{path} does not hold successors.")
    known = KnownSuccessors(**tensors)
    if not _is_whole(known, vocabulary):
        raise QuasarError(f"{path} holds the successors of another model, or is damaged.")
    return known


def _is_whole(known: KnownSuccessors, vocabulary: int) -> bool:
    """Whether the arrays belong together, and hold tokens of the vocabulary."""
    rows = len(known)
    shaped = rows <= MOST_CONTEXTS and known.tokens.shape == known.odds.shape == (rows, WIDTH)
    if not shaped or not rows:
        return shaped
    ascending = bool((np.diff(known.contexts) > 0).all()) and known.contexts[0] > 0
    return ascending and known.tokens.min() >= -1 and known.tokens.max() < vocabulary
