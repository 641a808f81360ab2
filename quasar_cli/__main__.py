"""The program: `quasar`, and `python -m quasar_cli` in a checkout that is not installed.

Ctrl-C ends it while its parts are still imported, too, and where Python can only tell of it, as in a callback.
"""

import _thread
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from quasar_cli import INTERRUPTED

_SHOW_CURSOR = b"\x1b[?25h"


class _Waiting:
    """An interrupt that came within an import: `is_due` when it comes again by itself, and not from whoever waits."""

    begun = is_due = False


def main() -> None:
    """Run the command line and exit."""
    sys.unraisablehook = interrupt_again
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else whoever started it wants it ignored
        signal.signal(signal.SIGINT, interrupt)
    try:
        from quasar_cli.main import main as run_command

        run_command()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C: raise KeyboardInterrupt, but within an import only behind its end; the second one ends the process.

    A library may take it for a part that is missing, and go on; what is imported by half fails later in another way.
    """
    by_itself, _Waiting.is_due = _Waiting.is_due, False
    if not _imports(frame):
        _Waiting.begun = False
        raise KeyboardInterrupt
    if _Waiting.begun and not by_itself:
        if os.isatty(2):
            os.write(2, _SHOW_CURSOR)
        os._exit(INTERRUPTED)
    _Waiting.begun = True
    _come_again()


def interrupt_again(ignored: Any) -> None:
    """Python tells here of an exception that cannot be raised where it came up: an interrupt comes once more then."""
    if issubclass(ignored.exc_type, KeyboardInterrupt):
        _come_again()
    else:
        sys.__unraisablehook__(ignored)


def _come_again() -> None:
    """Interrupt a moment later: what is raised at once would be ignored again."""
    again = threading.Timer(0.01, _interrupt_by_itself)
    again.daemon = True
    again.start()


def _interrupt_by_itself() -> None:
    _Waiting.is_due = True
    _thread.interrupt_main()


def _imports(frame: FrameType | None) -> bool:
    """Whether an import runs, by the frames of Python's own importing."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


if __name__ == "__main__":
    main()
