"""Files written whole or not at all, also where the power fails: beside their place, synced, then renamed."""

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from quasar_core.errors import QuasarError, UsageError

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


def refuse_foreign(path: Path, flag: str, kind: str, is_ours: Callable[[Path], bool]) -> None:
    """Refuse, before any work, an output that exists and that quasar did not write; `kind` is what it writes there.

    UsageError that names the flag; `is_ours` looks into a file, and may raise OSError, ValueError or QuasarError for
    one of others.
    """
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
