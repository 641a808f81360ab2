"""The pairs that `quasar quantize` recorded, and the one in use: home()/pairs.json."""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quasar_core.errors import QuasarError, UsageError
from quasar_core.store.home import home

FORMAT_VERSION = 1


@dataclass(frozen=True)
class PairRecord:
    """One target and its verifier: `target` is a name that resolve_model finds, `verifier` an absolute folder."""

    name: str
    target: str
    verifier: str


def list_pairs() -> list[PairRecord]:
    """Every recorded pair, the oldest first."""
    return _read()[0]


def current_pair() -> PairRecord | None:
    """The pair that commands use when no model is named; None where there is none."""
    pairs, current = _read()
    return next((pair for pair in pairs if pair.name == current), None)


def find_pair(name: str) -> PairRecord:
    """The recorded pair of that name; UsageError that lists the known ones."""
    return _find(list_pairs(), name)


def record_pair(target: str, verifier: Path) -> PairRecord:
    """Record a pair and make it the current one; a pair with the same verifier folder is replaced.

    `target` is a ModelSource's name, so that it is found again from anywhere. The pair is named after the verifier's
    folder, with a number where another pair has that name already.
    """
    folder = str(verifier.expanduser().resolve())
    others = [pair for pair in list_pairs() if pair.verifier != folder]
    record = PairRecord(_free_name(Path(folder).name, others), target, folder)
    _write([*others, record], record.name)
    return record


def use_pair(name: str) -> PairRecord:
    """Make a recorded pair the current one."""
    pairs = list_pairs()
    record = _find(pairs, name)
    _write(pairs, record.name)
    return record


def remove_pair(name: str, delete_files: bool) -> PairRecord:
    """Forget a pair, and delete its verifier's folder if asked to; the target is never touched.

    Only a folder that quasar wrote (it has a quasar.json) is deleted. Without the current pair, none is current.
    """
    pairs, current = _read()
    record = _find(pairs, name)
    folder = Path(record.verifier)
    if delete_files and folder.exists():
        _delete(folder)
    kept = [pair for pair in pairs if pair != record]
    _write(kept, current if current != record.name else None)
    return record


def _delete(folder: Path) -> None:
    if not (folder / "quasar.json").is_file():
        raise QuasarError(f"{folder} was not written by quasar (it has no quasar.json), so it is not deleted.")
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise QuasarError(f"{folder} cannot be deleted: {error.strerror or error}.") from error


def _find(pairs: Sequence[PairRecord], name: str) -> PairRecord:
    for pair in pairs:
        if pair.name == name:
            return pair
    known = ", ".join(pair.name for pair in pairs) or "none"
    raise UsageError(f"There is no pair {name}; the recorded pairs: {known}.")


def _free_name(wanted: str, others: Sequence[PairRecord]) -> str:
    taken = {pair.name for pair in others}
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}-{number}"
    return name


def _read() -> tuple[list[PairRecord], str | None]:
    path = home() / "pairs.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return [PairRecord(**pair) for pair in content["pairs"]], content["current"]
    except FileNotFoundError:
        return [], None
    except OSError as error:
        raise QuasarError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise QuasarError(f"{path} is damaged: repair it, or delete it and quantize again.") from error


def _write(pairs: Sequence[PairRecord], current: str | None) -> None:
    path = home() / "pairs.json"
    content = {"format_version": FORMAT_VERSION, "current": current, "pairs": [asdict(pair) for pair in pairs]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".pairs-", delete=False) as stream:
            json.dump(content, stream, indent=2)
        os.replace(stream.name, path)
    except OSError as error:
        raise QuasarError(f"{path} cannot be written: {error.strerror or error}.") from error
