"""The program: `quasar`, and `python -m quasar_cli` in a checkout that is not installed.

Ctrl-C ends it while its parts are still imported, too, and where Python can only tell of it, as in a callback.
"""

import _thread
import sys
import threading
from typing import Any

from quasar_cli import INTERRUPTED


def main() -> None:
    """Run the command line and exit."""
    sys.unraisablehook = interrupt_again
    try:
        from quasar_cli.main import main as run_command

        run_command()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def interrupt_again(ignored: Any) -> None:
    """Python tells here of an exception that cannot be raised where it came up: an interrupt comes once more then.

    A moment later: raised from here it would be ignored again.
    """
    if issubclass(ignored.exc_type, KeyboardInterrupt):
        again = threading.Timer(0.01, _thread.interrupt_main)
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(ignored)


if __name__ == "__main__":
    main()
