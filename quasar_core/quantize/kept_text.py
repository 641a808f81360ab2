"""Text that is kept while a run goes on: tensors in a file, with a check sum that a changed byte does not pass."""

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from quasar_core.checkpoint.writer import pieces_of, save_tensors
from quasar_core.errors import QuasarError
from quasar_core.files import require_regular

_CHECK = "crc32"  # the tensor that holds the sum


def keep_text(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the tensors, whole or not at all."""
    save_tensors(path, {**tensors, _CHECK: torch.tensor([check_sum(tensors)])})


def read_text(path: Path, remedy: str) -> dict[str, torch.Tensor]:
    """Read what `keep_text` wrote; QuasarError, with a remedy, where the file was damaged since."""
    require_regular(path)
    try:
        tensors = load_file(path)
        if _CHECK not in tensors:
            raise ValueError("it has no check sum")
        if int(tensors.pop(_CHECK)) != check_sum(tensors):
            raise ValueError("its check sum is of another content")
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise QuasarError(f"{path} is not readable ({why}): {remedy}.") from error
    return tensors


def check_sum(tensors: Mapping[str, torch.Tensor]) -> int:
    """The check sum of names, kinds, shapes and values."""
    total = 0
    for piece in pieces_of(tensors):
        total = zlib.crc32(piece, total)
    return total
