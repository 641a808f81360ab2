"""Compute a model's fingerprint: it tells whether a verifier was made from a target, without reading all of it."""

import hashlib
import json
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from quasar_core.errors import QuasarError, reason
from quasar_core.page_cache import expect_random_reads
from quasar_core.store.model_config import read_config
from quasar_core.store.safetensors_header import read_headers

_SAMPLE_BYTES = 1024
# Rewritten by tools that load and save the same model, so no part of what it is.
_INCIDENTAL_KEYS = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")


def fingerprint(folder: Path) -> str:
    """SHA-256 (hex) over the config and, for every tensor by name, its dtype, shape and 1,024 bytes from its middle.

    How the tensors are spread over files does not matter. An 8B model takes some hundred short reads.
    """
    digest = hashlib.sha256()
    essentials = {key: value for key, value in read_config(folder).items() if key not in _INCIDENTAL_KEYS}
    digest.update(json.dumps(essentials, sort_keys=True).encode())
    try:
        with ExitStack() as stack:
            files: dict[Path, BinaryIO] = {}
            for entry in read_headers(folder):
                if entry.file not in files:
                    files[entry.file] = stack.enter_context(entry.file.open("rb"))
                    expect_random_reads(files[entry.file].fileno())
                digest.update(json.dumps([entry.name, entry.dtype, entry.shape]).encode())
                digest.update(_middle(files[entry.file], entry.start, entry.size))
    except OSError as error:
        raise QuasarError(f"The weights in {folder} cannot be read: {reason(error)}.") from error
    return digest.hexdigest()


def _middle(stream: BinaryIO, start: int, size: int) -> bytes:
    length = min(size, _SAMPLE_BYTES)
    stream.seek(start + (size - length) // 2)
    return stream.read(length)
