"""Carry what Triton compiled out of one call of the GPU bench and into the next, so that it is compiled once."""

import tarfile
from pathlib import Path

FILE = "compiled.tar.gz"
LARGEST = 16 << 20  # bytes that a machine may give back in one file


def pack(folder: Path, archive: Path) -> None:
    """The binaries and their descriptions; the text that they were made of is left out."""
    if not folder.exists():
        return
    kept = [path for path in sorted(folder.rglob("*")) if path.suffix in (".cubin", ".json", ".so")]
    with tarfile.open(archive, "w:gz") as packed:
        for path in kept:
            packed.add(path, str(path.relative_to(folder)))
    if archive.stat().st_size > LARGEST:
        print(f"{archive} has {archive.stat().st_size / 1e6:.0f} MB: more than {LARGEST / 1e6:.0f} MB.", flush=True)


def unpack(archive: Path | None, folder: Path) -> None:
    """Into a folder that Triton takes for its cache; nothing without an archive."""
    if archive is not None:
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
