"""The program: `quasar`, and `python -m quasar_cli` in a checkout that is not installed.

Ctrl-C ends it while its parts are still imported, too, and where Python can only tell of it, as in a callback.
"""

import _thread
import signal
import sys
import threading
from types import FrameType
from typing import Any

from quasar_cli import INTERRUPTED


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
    """Ctrl-C: raise KeyboardInterrupt, but within an import only behind its end.

    A library may take it for a part that is missing, and go on; what is imported by half fails later in another way.
    """
    if _imports(frame):
        _come_again()
    else:
        raise KeyboardInterrupt


def interrupt_again(ignored: Any) -> None:
    """Python tells here of an exception that cannot be raised where it came up: an interrupt comes once more then."""
    if issubclass(ignored.exc_type, KeyboardInterrupt):
        _come_again()
    else:
        sys.__unraisablehook__(ignored)


def _come_again() -> None:
    """Interrupt a moment later: what is raised at once would be ignored again."""
    again = threading.Timer(0.01, _thread.interrupt_main)
    again.daemon = True
    again.start()


def _imports(frame: FrameType | None) -> bool:
    """Whether an import runs, by the frames of Python's own importing."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


if __name__ == "__main__":
    main()
