"""Keep files that are loaded as code in folders of this user alone, each with a digest beside it.

A library is opened once, and what was opened is what is checked and loaded: a path may name another file a moment
later. Where a system has neither owners nor modes of files (Windows), the digest alone is checked: the user's own
folders are closed to others there. Where it opens no file by its descriptor (macOS, Windows), the path is loaded once
what lies there was checked.
"""

import contextlib
import ctypes
import hashlib
import os
import shutil
import stat
from pathlib import Path

from quasar_core.errors import QuasarError
from quasar_core.files import sync

_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_HAS_OWNERS = hasattr(os, "geteuid")
_DESCRIPTORS = Path("/proc/self/fd")  # where Linux opens files by them
# Links are not followed, pipes not waited for, lines not translated; each where the system knows it.
_HOW = sum(getattr(os, name, 0) for name in ("O_RDONLY", "O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))


def make_private(folder: Path) -> None:
    """Make a folder of this user alone (0700), or close one that is there.

    QuasarError where it belongs to somebody else or is a link, OSError where it cannot be made.
    """
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=stat.S_IRWXU, parents=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise QuasarError(f"code is not loaded from {folder}, which is not a folder")
    if not _HAS_OWNERS:
        return
    if found.st_uid != os.geteuid():
        raise QuasarError(f"code is not loaded from {folder}, which belongs to another user")
    if found.st_mode & _OTHERS:
        folder.chmod(stat.S_IRWXU)


def install(built: Path, library: Path) -> None:
    """Put a built library and its digest in place, both at once: the library's folder is replaced as a whole.

    `built` lies alone in a private folder beside that of `library`.
    """
    built.chmod(stat.S_IRUSR | stat.S_IWUSR)
    _digest_file(built).write_text(hashlib.sha256(built.read_bytes()).hexdigest() + "\n", encoding="ascii")
    for path in (built, _digest_file(built), built.parent):
        sync(path)
    if os.path.lexists(library.parent):
        _remove(library.parent)
    built.parent.rename(library.parent)
    sync(library.parent.parent)


def damage(library: Path) -> str | None:
    """What is wrong with a library, or None where it is as `install` left it."""
    try:
        os.close(_open_whole(library))
    except QuasarError as error:
        return str(error)
    return None


def load(library: Path) -> ctypes.CDLL:
    """Load a library whose folder, owner, mode and digest are right.

    QuasarError where one of them is not, OSError where the system cannot load it.
    """
    # Left open: the loader takes two libraries of one path, such as that of a descriptor used again, for one.
    descriptor = _open_whole(library)
    if _DESCRIPTORS.is_dir():
        return ctypes.CDLL(str(_DESCRIPTORS / str(descriptor)))
    os.close(descriptor)
    return ctypes.CDLL(str(library))


def _open_whole(library: Path) -> int:
    """A descriptor of the library; QuasarError that says what is wrong with it."""
    make_private(library.parent)
    try:
        descriptor = os.open(library, _HOW)
    except OSError as error:
        raise QuasarError(f"{library} cannot be read ({error.strerror})") from error
    try:
        _refuse_foreign(os.fstat(descriptor), library)
        with os.fdopen(os.dup(descriptor), "rb") as file:
            found = hashlib.sha256(file.read()).hexdigest()
        if found != _expected_digest(library):
            raise QuasarError(f"{library} is not what was compiled (its digest differs)")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _refuse_foreign(found: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise QuasarError(f"{path} is not a file")
    if not _HAS_OWNERS:
        return
    if found.st_uid != os.geteuid() or found.st_mode & _OTHERS_WRITE:
        raise QuasarError(f"{path} belongs to another user, or others may write it")


def _expected_digest(library: Path) -> str:
    if not _digest_file(library).is_file():  # reading a pipe would wait forever
        raise QuasarError(f"{library} has no digest beside it")
    try:
        return _digest_file(library).read_text(encoding="ascii", errors="replace").strip()
    except OSError as error:
        raise QuasarError(f"{library} has a digest that cannot be read ({error.strerror})") from error


def _digest_file(library: Path) -> Path:
    return library.with_name(library.name + ".sha256")


def _remove(path: Path) -> None:
    """A folder and what is in it, or whatever else has its name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
