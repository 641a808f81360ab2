"""Find quasar's own folder; replace and remove verifiers: the files that quasar wrote, and nothing else."""

import os
import re
import shutil
from glob import escape
from pathlib import Path
from typing import Any, Literal

from quasar_core.errors import QuasarError, UsageError
from quasar_core.files import absolute, exists, is_folder, read_json, sync

CARD = "quasar.json"
# In a folder of work in progress: held by the process that works there, and the mark by which quasar knows its own.
LOCK = "lock"
COMMITS, IDENTITY = "commits", "identity.json"
_LONGEST_LOCK = 32  # bytes; it holds a process's number
# What a model folder holds beside weights and config, and what a quantized copy of it keeps.
KEPT_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
SUCCESSORS = "successors.tensors"  # what drafts begin with
_OWN_FILES = frozenset(
    (*KEPT_FILES, CARD, SUCCESSORS, "config.json", "quantize_config.json", "README.md", "model.safetensors.index.json")
)
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")

# The moments at which finished work changes hands: a process may end at any of them, and nothing is lost.
STEPS = (
    "described",  # the working folder is whole
    "set aside",  # a verifier that stood in the output's place is renamed
    "in place",  # the output has its name
    "commits cleared",
    "replaced one removed",
    "recorded",  # in pairs.json
    "unlocked",  # nothing is left to do
)

Relation = Literal["is", "holds", "lies in"]


def home() -> Path:
    """$QUASAR_HOME, or the platform's cache folder for quasar; nothing is created."""
    chosen = os.environ.get("QUASAR_HOME")
    if chosen:
        return absolute(Path(chosen))
    from platformdirs import user_cache_path  # where the folder is named, a bare checkout runs without this package

    return user_cache_path("quasar", appauthor=False)


def read_card(folder: Path) -> dict[str, Any] | None:
    """The card of a verifier that quasar wrote; None for any other folder, whatever its quasar.json is."""
    try:
        card = read_json(folder / CARD)
    except QuasarError:
        return None
    return card if {"format_version", "target"} <= card.keys() else None


def is_verifier(folder: Path) -> bool:
    """Whether quasar wrote this folder."""
    return read_card(folder) is not None


def own_files(folder: Path) -> list[str]:
    """Names of the files in a verifier's folder that quasar writes, sorted, the card last."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and _is_own(path.name))
    return sorted(names, key=lambda name: name == CARD)


def _is_own(name: str) -> bool:
    return name in _OWN_FILES or _SHARD.fullmatch(name) is not None


def remove_verifier(folder: Path) -> bool:
    """Remove a verifier's own files, and the folder if nothing else is in it; whether it is gone.

    The card goes last, so that a removal that was interrupted can be repeated. Raises OSError.
    """
    clear_commits(folder)
    if is_marked(folder):
        (folder / LOCK).unlink()
    for name in own_files(folder):
        (folder / name).unlink()
    if any(folder.iterdir()):
        return False
    folder.rmdir()
    return True


def clear_commits(folder: Path) -> None:
    """Remove the finished blocks that a verifier was put together from."""
    if is_marked(folder) and (folder / COMMITS).is_dir():
        shutil.rmtree(folder / COMMITS)


def partial_folder(output: Path) -> Path:
    """Where the work in progress lies."""
    return output.with_name(output.name + ".partial")


def replaced_folder(output: Path) -> Path:
    """Where a replaced folder lies until the new one stands, and afterwards what it held beside quasar's files."""
    return output.with_name(output.name + ".replaced-by-quasar")


def refuse_place(output: Path, source: Path) -> None:
    """Refuse an output whose writing would touch the model in `source`, or anything that quasar did not write."""
    if not output.name:
        raise UsageError(f"{output} is no place for a verifier: name a folder in it.")
    for place in (output, partial_folder(output), replaced_folder(output)):
        if relation := relate(place, source):
            beside = "" if place == output else f", and for --output {output} it would be written"
            raise UsageError(f"{place} {relation} the model {source}{beside}: name another --output.")
    if os.path.lexists(output) and not may_be_replaced(output):
        raise UsageError(
            f"{output} exists and is no verifier that quasar wrote (it has no {CARD} of quasar's), so it is never "
            "replaced; name another --output."
        )
    refuse_foreign_work(partial_folder(output))


def refuse_existing(output: Path, force: bool) -> None:
    """An output that exists is replaced only with `--force`."""
    if exists(output) and not force:
        raise UsageError(f"{output} exists; pass --force to replace it, or --output for another place.")


def may_be_replaced(output: Path) -> bool:
    """Whether quasar wrote it, or nothing is in it."""
    return is_verifier(output) or (output.is_dir() and not any(output.iterdir()))


def refuse_foreign_work(partial: Path) -> None:
    """Work in progress is emptied and removed: refuse a folder of that name that quasar did not make."""
    if is_folder(partial) and any(partial.iterdir()) and not is_marked(partial):
        raise UsageError(
            f"{partial} is where unfinished work would lie, and holds something else: move that away, or name another "
            "output."
        )


def is_marked(partial: Path) -> bool:
    """Whether quasar made a folder of work in progress."""
    lock = partial / LOCK
    return lock.is_file() and lock.stat().st_size <= _LONGEST_LOCK


def remove_work(partial: Path) -> None:
    """Remove a folder of work in progress; its mark goes last, so that it can be repeated."""
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
    (partial / LOCK).unlink(missing_ok=True)
    partial.rmdir()


def begin_work(partial: Path) -> None:
    """An empty folder for work in progress; what an interrupted run left there is removed."""
    refuse_foreign_work(partial)
    if partial.exists():
        remove_work(partial)
    partial.mkdir(parents=True)
    (partial / LOCK).touch()


def end_work(partial: Path, output: Path) -> None:
    """Give finished work its name; `output` must not exist. The mark goes last: only a marked folder may be emptied."""
    if os.path.lexists(output):
        raise UsageError(f"{output} exists; the finished work is in {partial}.")
    partial.rename(output)
    sync(output.parent)
    (output / LOCK).unlink()


def set_aside(output: Path) -> None:
    """Make room for a new verifier: the one that stands there is renamed, and kept until the new one stands."""
    if not os.path.lexists(output):
        return
    if not may_be_replaced(output):
        raise QuasarError(f"{output} is no verifier that quasar wrote, so it is not replaced.")
    if not is_verifier(output):
        output.rmdir()  # nothing is in it
        return
    place, number = replaced_folder(output), 1
    while os.path.lexists(place):  # what an earlier one held beside its own files
        number += 1
        place = replaced_folder(output).with_name(f"{replaced_folder(output).name}-{number}")
    output.rename(place)


def put_back(output: Path) -> None:
    """Where a run ended between setting the old verifier aside and naming the new one, the old one stands again."""
    for place in set_aside_before(output):
        if is_verifier(place) and not os.path.lexists(output):
            place.rename(output)


def set_aside_before(output: Path) -> list[Path]:
    """Verifiers that were set aside, and what is left of one whose removal was interrupted, the latest first."""
    places = sorted(output.parent.glob(f"{escape(replaced_folder(output).name)}*"), reverse=True)
    return [place for place in places if may_be_replaced(place)]


def relate(one: Path, other: Path) -> Relation | None:
    """How a folder lies to another one that exists: by what they are, whatever their names' spelling and links."""
    of_one, of_other = _line(one), _line(other)
    if of_one[0] is not None and of_one[0] == of_other[0]:
        return "is"
    if of_one[0] is not None and of_one[0] in of_other:
        return "holds"
    return "lies in" if of_other[0] is not None and of_other[0] in of_one else None


def _line(path: Path) -> list[tuple[int, int] | None]:
    """Device and number of a folder and of every folder that it lies in; None of those that do not exist."""
    resolved = path.expanduser().resolve()
    line: list[tuple[int, int] | None] = []
    for place in (resolved, *resolved.parents):
        try:
            found = place.stat()
            line.append((found.st_dev, found.st_ino))
        except OSError:
            line.append(None)
    return line


def reached(step: str) -> None:
    """Do nothing; tests end the process here."""
