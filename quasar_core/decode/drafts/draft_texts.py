"""Read the texts that the user names for drafts, and keep their index in quasar's own folder.

An index is kept by the tokenizer and the texts' content, so a changed file is read anew and an unchanged one never is.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

from quasar_core.decode.text import encode_text
from quasar_core.draft.texts import TextIndex
from quasar_core.errors import QuasarError, UsageError, foreign_errors
from quasar_core.files import absolute, is_file, is_folder, read_text, written_whole
from quasar_core.records import Progress, no_progress
from quasar_core.store.folders import home

LARGEST_FILE = 4 << 20  # bytes; of a folder's files, larger ones are left out
MOST_BYTES = 64 << 20  # of all texts: what is beyond is left out
MOST_KEPT = 16  # indexes; of more, the oldest go
FORMAT = "1"
NAMED = 5  # files that a sentence names


@dataclass
class Texts:
    """The texts that were read, by file, and what was left out, by reason."""

    contents: dict[Path, str] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    size: int = 0

    def add(self, path: Path, named: bool) -> None:
        """Read a file; one that is no text, or too large, is refused where the user named it, and else left out."""
        if path in self.contents:
            return
        try:
            # Files of the system, as in /proc, have no size, and reading one may wait for ever.
            text = read_text(path, LARGEST_FILE, UsageError) if named or path.stat().st_size else ""
            if "\0" in text:
                raise UsageError(f"{path} holds null bytes: it is not text.")
        except UsageError:
            if named:
                raise
            self._leave(path, "larger than 4 MiB" if path.stat().st_size > LARGEST_FILE else "not text")
            return
        if self.size + len(text) > MOST_BYTES:
            self._leave(path, "beyond 64 MiB in all")
            return
        self.contents[path] = text
        self.size += len(text)

    def _leave(self, path: Path, why: str) -> None:
        self.left_out.setdefault(why, []).append(path.name)

    def describe(self, tokens: int) -> str:
        """What drafts are made from, in a sentence."""
        files = "1 file" if len(self.contents) == 1 else f"{len(self.contents)} files"
        parts = [f"draft texts: {files} of {tokens:,} tokens"]
        for why, names in self.left_out.items():
            listed = ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
            parts.append(f"left out as {why}: {listed} ({len(names)})")
        return "; ".join(parts)


def read_index(
    paths: Sequence[str], tokenizer: PreTrainedTokenizerBase, progress: Progress = no_progress
) -> tuple[TextIndex, str]:
    """The index of files and folders, and a sentence that says what it holds and what was left out.

    Raises UsageError for a path that is not there, a named file that is no text, and where nothing is left to read.
    """
    texts = read_texts(paths)
    path = home() / "drafts" / f"texts-{_key(texts, tokenizer)}.safetensors"
    index, trouble = _stored(path), ""
    if index is None:
        index = _build(texts, tokenizer, progress)
        trouble = _keep(index, path)
    return index, texts.describe(int((index.ids >= 0).sum())) + trouble


def read_texts(paths: Sequence[str]) -> Texts:
    """The texts of files and folders; files and folders whose name begins with a dot are left out of a folder."""
    texts = Texts()
    for name in paths:
        path = absolute(Path(name))
        if is_folder(path):
            for file in _files(path):
                texts.add(file, named=False)
        else:
            texts.add(path, named=True)
    if not any(texts.contents.values()):
        raise UsageError(f"--draft-from {' '.join(map(str, paths))}: no text was found there.")
    return texts


def _files(folder: Path) -> Iterator[Path]:
    """The regular files of a folder and those in it, in the order of their names; links are not followed."""
    with foreign_errors(f"{folder} cannot be read"):
        for place, folders, names in os.walk(folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                path = Path(place, name)
                if not name.startswith(".") and not path.is_symlink() and path.is_file():
                    yield path


def _key(texts: Texts, tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of all that an index depends on."""
    digest = hashlib.sha256(f"{FORMAT} {tokenizer_digest(tokenizer)}".encode())
    for text in texts.contents.values():
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()[:32]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """What tells tokenizers apart: the vocabulary, and the rules where they are at hand."""
    digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    digest.update(backend.to_str().encode() if backend is not None else b"")
    return digest.hexdigest()[:32]


def _build(texts: Texts, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> TextIndex:
    encoded = []
    for done, text in enumerate(texts.contents.values()):
        progress("reading draft texts", done, len(texts.contents))
        encoded.append(encode_text(tokenizer, text))
    progress("reading draft texts", len(texts.contents), len(texts.contents))
    return TextIndex.build(encoded)


def _stored(path: Path) -> TextIndex | None:
    """The index of a file; None for one that is not there or is damaged, which is written anew."""
    if not is_file(path):
        return None
    try:
        tensors = load_file(path)
        index = TextIndex(tensors["ids"], tensors["order"])
    except Exception:  # whatever safetensors raises for bytes that are none of its own
        return None
    is_whole = index.ids.dtype == index.order.dtype == np.int32 and index.ids.ndim == index.order.ndim == 1
    inside = is_whole and bool(((index.order >= 0) & (index.order < len(index.ids) - 1)).all())
    return index if inside else None


def _keep(index: TextIndex, path: Path) -> str:
    """Write an index, and remove the oldest of many; why it could not be kept, if so."""
    try:
        with foreign_errors(f"{path} could not be written"), written_whole(path) as partial:
            save_file({"ids": index.ids, "order": index.order}, partial)
    except QuasarError as error:
        return f"; read again next time: {error}".rstrip(".")
    kept = sorted(path.parent.glob("texts-*.safetensors"), key=lambda file: file.stat().st_mtime)
    for old in kept[:-MOST_KEPT]:
        old.unlink(missing_ok=True)
    return ""


def forget_texts() -> int:
    """Remove every index that was kept; how many there were."""
    kept = list((home() / "drafts").glob("texts-*.safetensors"))
    for path in kept:
        path.unlink(missing_ok=True)
    return len(kept)
