"""The two errors that a user may see, and those of other libraries and of the system turned into them.

Every other exception is a defect.
"""

from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST = 300  # characters of a reason
# By name: these classes live in libraries that may not be loaded. The first is how Rust's panics arrive, outside of
# Exception; the second has a sentence of its own at the command line.
_PANIC, _OUT_OF_MEMORY = "PanicException", "OutOfMemoryError"


class QuasarError(Exception):
    """Something failed; the message is one clear sentence (exit code 1)."""


class WriteError(QuasarError):
    """A file could not be written, as on a full disk."""


class UsageError(QuasarError):
    """The command line or the input cannot be right; the message names the option (exit code 2)."""


class ContextFull(UsageError):
    """A prompt leaves no room in the context."""


@contextmanager
def foreign_errors(failed: str, kind: type[QuasarError] = QuasarError) -> Iterator[None]:
    """Raise `kind` for whatever another library raises within: `failed`, such as "X could not be loaded", and why.

    For calls of transformers, tokenizers, huggingface_hub, safetensors and jinja on files that a user gave: what they
    raise for a damaged file shares no base class. Our own errors, interrupts, a lack of memory, and an output that
    nobody reads pass through.
    """
    try:
        yield
    except (QuasarError, MemoryError, BrokenPipeError):  # the last: nobody reads the output any more
        raise
    except BaseException as error:
        if type(error).__name__ == _OUT_OF_MEMORY or not (isinstance(error, Exception) or _is_panic(error)):
            raise
        raise kind(f"{failed}: {reason(error)}.") from error


def reason(error: BaseException) -> str:
    """Why something failed, in one line without its full stop."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if "trust_remote_code" in str(error):
        return "it brings Python code of its own, which runs only with --trust-remote-code"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    words = " ".join(_first_sentence(str(error)).split()).rstrip(".:")
    if isinstance(error, KeyError):
        words = f"{words} is missing"
    return (words if len(words) <= _LONGEST else words[:_LONGEST] + "...") or type(error).__name__


def _first_sentence(message: str) -> str:
    """The first line, with those after it as long as each announces the next by a colon."""
    taken: list[str] = []
    for line in filter(None, map(str.strip, message.splitlines())):
        taken.append(line)
        if not line.endswith(":"):
            break
    return " ".join(taken)


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == _PANIC
