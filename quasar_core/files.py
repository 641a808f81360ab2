"""Read files strictly, and write them whole or not at all, also where the power fails: synced, then renamed."""

import errno
import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from quasar_core.errors import QuasarError, UsageError, foreign_errors, reason

MAX_JSON_BYTES = 1 << 28
BYTE_ORDER_MARK = "\ufeff"  # which some editors write before a text, and which is none of it
MAX_TEXT_BYTES = 1 << 32
MAX_DEPTH = 100  # of lists and objects within one another
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def is_folder(path: Path) -> bool:
    """Whether a folder is there; QuasarError where that cannot be told (no permission, a name too long)."""
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def exists(path: Path) -> bool:
    """Whether anything is there; QuasarError as `is_folder`."""
    return _mode(path) is not None


def is_file(path: Path, kind: type[QuasarError] = QuasarError) -> bool:
    """Whether a regular file is there; QuasarError as `is_folder`; for a pipe, a device or a socket that `kind`."""
    mode = _mode(path)
    if mode is None or stat.S_ISDIR(mode):
        return False
    require_regular(path, kind)
    return True


def absolute(path: Path) -> Path:
    """The path with `~` and links resolved; UsageError for an unknown user, a loop of links, a null byte."""
    try:
        return path.expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"{_shown(path)} is no path: {reason(error)}.") from error


def require_regular(path: Path, kind: type[QuasarError] = QuasarError) -> int:
    """The size of a regular file in bytes. Reading anything else could wait forever, or never end."""
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise kind(f"{path} does not exist.") from error
    except (OSError, ValueError) as error:
        raise kind(f"{_shown(path)} cannot be read: {reason(error)}.") from error
    for is_kind, name in _KINDS:
        if is_kind(found.st_mode):
            raise kind(f"{path} is {name}, not a file.")
    return found.st_size


def refuse_special_files(folder: Path) -> None:
    """QuasarError for a pipe, a socket or a device among the files of a folder, which other libraries will open."""
    with foreign_errors(f"{folder} cannot be read"):
        for path in sorted((*folder.iterdir(), *folder.glob("additional_chat_templates/*"))):
            if path.exists() and not path.is_dir():
                require_regular(path)


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise QuasarError(f"{_shown(path)} cannot be read: {reason(error)}.") from error


def _shown(path: Path) -> str:
    """A path in a sentence, cut where it is too long for one."""
    text = str(path).replace("\0", "\\0")
    return text if len(text) <= 200 else f"{text[:100]}... ({len(text)} characters)"


@contextmanager
def opened(path: Path, limit: int = MAX_TEXT_BYTES, kind: type[QuasarError] = QuasarError) -> Iterator[BinaryIO]:
    """A regular file of at most `limit` bytes, open for reading; what the system refuses meanwhile is one sentence."""
    size = require_regular(path, kind)
    if size > limit:
        raise kind(f"{path} has {size:,} bytes, and at most {limit:,} are read.")
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise kind(f"{path} cannot be read: {reason(error)}.") from error


def read_text(path: Path, limit: int = MAX_TEXT_BYTES, kind: type[QuasarError] = QuasarError) -> str:
    """The text of a UTF-8 file, its line ends as \\n, and without a byte order mark."""
    with opened(path, limit, kind) as file:
        content = file.read()
    try:
        text = content.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise kind(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path, kind: type[QuasarError] = QuasarError) -> dict[str, Any]:
    """The JSON object that a file holds."""
    text = read_text(path, MAX_JSON_BYTES, kind)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise kind(f"{path} is not readable JSON ({reason(error)}).") from error
    if not isinstance(content, dict):
        raise kind(f"{path} does not hold a JSON object.")
    return content


def read_json_if_there(path: Path) -> dict[str, Any] | None:
    """The JSON object of a file, as `read_json`; None where there is no file."""
    return read_json(path) if is_file(path) else None


def parse_json(text: str) -> Any:
    """JSON strictly: ValueError also for a key that stands twice, and for lists and objects too deep in one another.

    NaN and Infinity are read, since Python writes them and configs of models hold them.
    """
    try:
        content = json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} in line {error.lineno}, column {error.colno}") from error
    if _is_deeper(content, MAX_DEPTH):
        raise ValueError("it is nested too deeply")
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return content


def _is_deeper(content: Any, limit: int) -> bool:
    level = [content]
    for _ in range(limit):
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
        if not level:
            return False
    return True


def require_characters(text: str, what: str, kind: type[QuasarError] = UsageError) -> str:
    """The text; an error for what in it is no character, and what no tokenizer takes.

    That is half of a surrogate pair, as in JSON, or the stand-in for a byte of a name or a pipe that is not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        stands_in = 0xDC80 <= half <= 0xDCFF
        held = f"the byte \\x{half - 0xDC00:x}" if stands_in else f"\\u{half:x}, half of a character"
        raise kind(f"{what} is not {'UTF-8' if stands_in else 'Unicode'} text: it holds {held}.") from None
    return text


def write_json(path: Path, content: Any, alone: bool = False) -> None:
    """Indented JSON, whole or not at all; `alone` as in `written_whole`."""
    # A lone half of a character, such as of a folder's odd name, becomes the escape that JSON has for it.
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, text.encode("utf-8", errors="backslashreplace"), alone)


def write_json_lines(path: Path, lines: Iterable[Any]) -> None:
    """One JSON value a line, whole or not at all."""
    write_whole(path, b"".join(map(json_line, lines)))


def json_line(content: Any) -> bytes:
    """A JSON value as a line of a file."""
    return (json.dumps(content, ensure_ascii=False) + "\n").encode("utf-8", errors="backslashreplace")


def write_whole(path: Path, content: bytes, alone: bool = False) -> None:
    """A file, whole or not at all; QuasarError where it cannot be written, and for a device, which stays what it is."""
    try:
        if path.exists():
            require_regular(path)
        with written_whole(path, alone) as beside:
            beside.write_bytes(content)
    except (OSError, ValueError) as error:
        raise QuasarError(f"{_shown(path)} cannot be written: {reason(error)}.") from error


LOCK_SECONDS = 60  # that another process may hold a file of quasar's own folder
STRAY_SECONDS = 3600  # after which a file that nobody finished belongs to a process that ended


@contextmanager
def written_whole(path: Path, alone: bool = False) -> Iterator[Path]:
    """A place beside `path` to write to; once that is written, it takes the name of `path`.

    What stands in `path` stays until then. What earlier processes left unfinished is removed: with `alone` (under a
    lock) all of it, else that of processes that ended, and what is old. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = hashlib.sha256(path.name.encode()).hexdigest()[:12]  # names may be as long as a file system allows
    _clear_strays(path.parent, mark, alone)
    beside = path.parent / f".quasar-{mark}-{os.getpid()}.tmp"
    try:
        yield beside
        sync(beside)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: Path, text: str, alone: bool = False) -> None:
    """A text file, whole or not at all; raises OSError."""
    with written_whole(path, alone) as beside:
        beside.write_text(text, encoding="utf-8")


def require_place(path: Path, name: str) -> None:
    """Refuse, before any work, a file for which there is no folder, or none that can be written in; none is made.

    UsageError that asks for another `name`.
    """
    folder = path.parent
    if not is_folder(folder):
        raise UsageError(f"There is no folder {_shown(folder)}: make it, or name another {name}.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{folder} cannot be written in ({reason(error)}): name another {name}.") from error


def refuse_foreign(path: Path, flag: str, kind: str, is_ours: Callable[[Path], bool]) -> None:
    """Refuse, before any work, an output that exists and that quasar did not write; `kind` is what it writes there.

    So it does one that has no place (`require_place`). UsageError that names the flag; `is_ours` looks into a file, and
    may raise OSError, ValueError or QuasarError for one of others.
    """
    require_place(path, flag)
    if not os.path.lexists(path):
        return
    try:
        ours = path.is_file() and (path.stat().st_size == 0 or is_ours(path))
    except (OSError, ValueError, QuasarError):
        ours = False
    if not ours:
        raise UsageError(f"{path} exists and is not {kind}, so it is not replaced; name another {flag}.")


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot sync a folder
            raise
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file against other processes, to read, change and write it; the lock lies beside it and stays there.

    The system gives it up when its process ends, however it ends. Raises OSError, and QuasarError where another
    process holds it too long.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=LOCK_SECONDS):
            yield
    except Timeout as error:
        raise QuasarError(f"{path} has been held by another process for {LOCK_SECONDS} seconds.") from error


def _clear_strays(folder: Path, mark: str, alone: bool) -> None:
    for stray in folder.glob(f".quasar-{mark}-*.tmp"):
        try:
            old = time.time() - stray.stat().st_mtime > STRAY_SECONDS
            if alone or old or _has_ended(stray.stem.rpartition("-")[2]):
                stray.unlink()
        except FileNotFoundError:
            continue  # its process finished it just now


def _has_ended(process: str) -> bool:
    """Whether no process of that number runs here; where the system does not tell, none has."""
    if os.name != "posix" or not process.isdecimal():
        return False
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False  # somebody else's
    return False
