"""Keep what was measured on this machine in quasar's own folder: a file for each kind of value and its conditions.

The conditions name all that a value depends on (device, libraries, models), and are in the file's name: under others
nothing is found. A file that is damaged counts as absent, which is said, and what it held is measured again.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, Generic, TypeVar

from quasar_core.errors import QuasarError
from quasar_core.files import locked, read_json_if_there, write_json
from quasar_core.store.folders import home
from quasar_core.typed import build

Value = TypeVar("Value")
Parse = Callable[[Any], Value]  # from the JSON form; ValueError or KeyError for what cannot be


@dataclass(frozen=True)
class Entry(Generic[Value]):
    """A value, and when it was measured in seconds since 1970."""

    value: Value
    measured_at: float


@dataclass(frozen=True)
class _StoredEntry:
    value: Any
    measured_at: float


@dataclass(frozen=True)
class _Stored:
    """The content of a file."""

    conditions: dict[str, str]
    values: dict[str, _StoredEntry]


class Measured(Generic[Value]):
    """Values by name, under one set of conditions; `path` is their `measured_file`.

    `trouble` says in a sentence why they were not read from the file, or are not kept in it.
    """

    def __init__(
        self,
        path: Path,
        conditions: Mapping[str, str],
        parse: Parse[Value],
        form: Callable[[Value], Any] = lambda value: value,
    ) -> None:
        self.path, self.conditions, self._parse, self._form = path, dict(conditions), parse, form
        self.trouble: str | None = None
        self._entries: dict[str, Entry[Value]] = {}
        try:
            self._entries = _read(self.path, parse)[1]
        except QuasarError as error:
            self.trouble = f"measured anew: {error}".rstrip(".")

    def get(self, name: str) -> Entry[Value] | None:
        """What is known."""
        return self._entries.get(name)

    def keep(self, values: Mapping[str, Value]) -> None:
        """Add values to those that are known, and to those that other processes have kept meanwhile."""
        now = time.time()
        new = {name: Entry(value, now) for name, value in values.items()}
        self._change(lambda entries: {**entries, **new})

    def drop(self, name: str) -> None:
        """Forget a value, so that it is measured again."""
        if name in self._merged():
            self._change(lambda entries: {other: entry for other, entry in entries.items() if other != name})

    def _change(self, change: Callable[[dict[str, Entry[Value]]], dict[str, Entry[Value]]]) -> None:
        """Change what is known, here and in the file; no other process changes that meanwhile."""
        try:
            with locked(self.path):
                self._entries = change(self._merged())
                self._write()
        except (OSError, QuasarError) as error:
            self._entries = change(self._entries)
            self.trouble = f"not kept: {error}".rstrip(".")

    def _merged(self) -> dict[str, Entry[Value]]:
        """What is known here and in the file; of two values of one name the later."""
        try:
            others = _read(self.path, self._parse)[1]
        except QuasarError:  # `trouble` says so already, or it was damaged since: nothing of it can be kept
            return self._entries
        later = {name: entry for name, entry in others.items() if not self._knows_later(name, entry)}
        return {**self._entries, **later}

    def _knows_later(self, name: str, entry: Entry[Value]) -> bool:
        own = self._entries.get(name)
        return own is not None and own.measured_at > entry.measured_at

    def _write(self) -> None:
        kept = {
            name: {"value": self._form(entry.value), "measured_at": entry.measured_at}
            for name, entry in self._entries.items()
        }
        write_json(self.path, {"conditions": self.conditions, "values": kept})


def measured_file(kind: str, conditions: Mapping[str, str]) -> Path:
    """Where values of a kind lie that were measured under these conditions."""
    return _folder() / f"{kind}-{_key(conditions)}.json"


def _key(conditions: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(conditions), sort_keys=True).encode()).hexdigest()[:16]


def stored(kind: str, parse: Parse[Value]) -> Iterator[tuple[dict[str, str], dict[str, Entry[Value]]]]:
    """The conditions and values of every file of a kind; a damaged one is a QuasarError."""
    for path in sorted(_folder().glob(f"{kind}-*.json")):
        yield _read(path, parse)


def forget(kind: str) -> None:
    """Everything of a kind, under all conditions."""
    for path in _folder().glob(f"{kind}-*.json"):
        path.unlink(missing_ok=True)


def positive(seconds: Any) -> float:
    """A time in seconds; ValueError for what is none."""
    value = build(float, seconds)
    if not 0 < value < inf:
        raise ValueError(f"{seconds} is no time")
    return value


def _folder() -> Path:
    return home() / "measured"


def _read(path: Path, parse: Parse[Value]) -> tuple[dict[str, str], dict[str, Entry[Value]]]:
    content = read_json_if_there(path)
    if content is None:
        return {}, {}
    try:
        stored = build(_Stored, content)
        if not path.name.endswith(f"-{_key(stored.conditions)}.json"):
            raise ValueError("the conditions are others'")
        entries = {
            name: Entry(parse(entry.value), positive(entry.measured_at)) for name, entry in stored.values.items()
        }
    except (KeyError, ValueError) as error:
        raise QuasarError(f"{path} is damaged.") from error
    return stored.conditions, entries
