"""Whether a checkpoint's weights are those that were written: SHA-256 of each file, as `sha256sum` prints it.

`ShardWriter` computes them while it writes; they lie in quasar.json, under "sha256".
"""

import hashlib
from pathlib import Path

from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.errors import QuasarError
from quasar_core.records import Progress, no_progress
from quasar_core.store.safetensors_header import weight_files

KEY = "sha256"
NONE_RECORDED = "none is recorded in this checkpoint (another tool or an older quasar wrote it), so nothing was checked"
_CHUNK = 2**22  # bytes


def check_digest(checkpoint: VerifierCheckpoint, progress: Progress = no_progress) -> str:
    """Read all weights and compare them with what is recorded → what was found, in words.

    QuasarError that names the first file which differs, is missing, or is not recorded.
    """
    recorded = recorded_digests(checkpoint)
    if recorded is None:
        return NONE_RECORDED
    beside = checkpoint.folder.glob("*.safetensors")  # not read, and not what was written either
    files = {file.name: file for file in sorted({*weight_files(checkpoint.folder), *beside})}
    for name in sorted(recorded.keys() ^ files.keys()):
        what = "is missing" if name in recorded else "is not among those that quasar.json records"
        raise QuasarError(f"The weights of {checkpoint.folder} are not those that were written: {name} {what}.")
    for done, (name, file) in enumerate(files.items()):
        progress("checking weights", done, len(files))
        if file_digest(file) != recorded[name]:
            raise QuasarError(f"{file} is damaged or was changed: its SHA-256 is not the one in quasar.json.")
    progress("checking weights", len(files), len(files))
    return f"{len(files)} file{'s' if len(files) > 1 else ''} of weights as they were written"


def recorded_digests(checkpoint: VerifierCheckpoint) -> dict[str, str] | None:
    """SHA-256 (hex) by file name; None where none is recorded, QuasarError where the record is no such thing."""
    recorded = checkpoint.card.get(KEY)
    if recorded is None:
        return None
    if not isinstance(recorded, dict) or not all(isinstance(value, str) for value in recorded.values()):
        raise QuasarError(f"{checkpoint.folder / 'quasar.json'} holds no digests under {KEY}.")
    return recorded


def file_digest(file: Path) -> str:
    """SHA-256 (hex) of a file; QuasarError where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise QuasarError(f"{file} cannot be read: {error.strerror or error}.") from error
    return digest.hexdigest()
