r"""Read the messages of a chat: pasted text is one message, and so are lines that are continued.

A line that ends in \ goes on in the next one; after a line that begins with three double quotes all lines belong to the
message, up to the next three. In a terminal lines can be edited, and those of earlier chats are found with the arrows.
"""

import json
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from quasar_cli import console
from quasar_core.errors import QuasarError, foreign_errors
from quasar_core.files import exists, json_line, read_text, write_json_lines
from quasar_core.store import home

QUOTES = '"""'
PROMPT, CONTINUED = "> ", "... "
MOST_KEPT = 1000
_PASTE_PAUSE = 0.05  # seconds in which the next line of a paste has come


def read_messages(keep_history: bool) -> Iterator[str]:
    """Messages and commands until the input ends; empty ones are left out."""
    keeps = keep_history and sys.stdin.isatty() and find_spec("readline")  # which Windows lacks
    history = History(home() / "chat_history.jsonl") if keeps else None
    while (message := _next_message()) is not None:
        if message := message.strip():
            if history is not None:
                history.add(message)
            yield message


class History:
    """The messages of earlier chats: a JSON text a line, in a file that its owner alone can read."""

    def __init__(self, path: Path) -> None:
        import readline

        self._readline, self._path = readline, path
        readline.set_auto_history(False)
        self._works = self._try(self._load)

    def add(self, message: str) -> None:
        """Remember a message, in this chat and for the next."""
        self._readline.add_history(message)
        self._works = self._works and self._try(lambda: self._append(message))

    def _load(self) -> None:
        if not exists(self._path):
            return
        kept = [json.loads(line) for line in read_text(self._path).splitlines()]
        for message in kept[-MOST_KEPT:]:
            self._readline.add_history(str(message))
        if len(kept) > 2 * MOST_KEPT:
            before = os.umask(0o077)
            try:
                write_json_lines(self._path, kept[-MOST_KEPT:])
            finally:
                os.umask(before)

    def _append(self, message: str) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(file, json_line(message))
        finally:
            os.close(file)

    def _try(self, act: Callable[[], None]) -> bool:
        """Whether it went well; where not, that is said once, and the chat goes on without."""
        try:
            with foreign_errors(f"The history {self._path} cannot be used"):
                act()
        except QuasarError as error:
            console.note_plain(f"{error} Messages of this chat are not kept.")
            return False
        return True


def _next_message() -> str | None:
    """The next message; in a terminal Ctrl-C drops what was typed, as one that is meant for an answer may come late."""
    while True:
        try:
            return _read_message()
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            console.note_plain("\n(/exit or Ctrl-D ends)")


def _read_message() -> str | None:
    """The next message, or None where the input ends before one begins."""
    first = _read_pasted()
    if first is None:
        return None
    if first.startswith(QUOTES) and "\n" not in first:
        return _read_quoted(first.removeprefix(QUOTES))
    while first.endswith("\\"):
        following = _read_line(CONTINUED)
        first = first[:-1] + ("" if following is None else f"\n{following}")
    return first


def _read_quoted(line: str | None) -> str:
    lines: list[str] = []
    while line is not None:
        if line.rstrip().endswith(QUOTES):
            lines.append(line.rstrip().removesuffix(QUOTES))
            break
        lines.append(line)
        line = _read_line(CONTINUED)
    return "\n".join(lines)


def _read_pasted() -> str | None:
    """A line, with those that came together with it; a command stands for itself."""
    text = _read_line(PROMPT)
    while text is not None and not text.startswith("/") and _more_is_there():
        following = _read_line("")
        if following is None:
            break
        text += f"\n{following}"
    return text


def _more_is_there() -> bool:
    if not sys.stdin.isatty():
        return False
    if sys.platform == "win32":  # whose select knows sockets alone
        import msvcrt

        time.sleep(_PASTE_PAUSE)
        return msvcrt.kbhit()
    return bool(select.select([sys.stdin], [], [], _PASTE_PAUSE)[0])


def _read_line(prompt: str) -> str | None:
    """The next line, or None at the end; in a terminal it can be edited."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None
    with suppress(ImportError):  # Windows edits lines itself
        import readline  # noqa: F401 - importing it gives input() its line editing

    try:
        return input(prompt)
    except EOFError:
        return None
