"""A process that a signal ends while a bar is drawn leaves the terminal as it was."""

import os
import pty
import signal
import sys

import pytest

SHOWN, HIDDEN = b"\x1b[?25h", b"\x1b[?25l"
DRAWING = """
import os, time
from quasar_cli import console
with console.progress_bar() as progress:
    progress("reading weights", 0, 2)
    time.sleep(0.3)
    os.write(1, b"<drawn>")
    time.sleep(60)
"""


def read(terminal: int, until: bytes = b"<end>") -> bytes:
    """What is written into a terminal, up to some bytes or to its end."""
    seen = b""
    while until not in seen:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # how the end of a terminal arrives on Linux
            break
        if not piece:
            break
        seen += piece
    return seen


INTERRUPTED = """
from rich.live import Live
from quasar_cli import console

def start(self, refresh=False):
    self.console.show_cursor(False)
    raise KeyboardInterrupt  # as it may come between this and what would show it again

Live.start = start
try:
    with console.progress_bar():
        pass
except KeyboardInterrupt:
    print("ended")
"""


def test_bars_that_are_interrupted_as_they_begin_show_it_too() -> None:
    child, terminal = pty.fork()
    if child == 0:
        os.execve(sys.executable, [sys.executable, "-c", INTERRUPTED], {**os.environ, "TERM": "xterm"})
    seen = read(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert b"ended" in seen
    assert seen.rindex(SHOWN) > seen.rindex(HIDDEN)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_cursor_is_shown_again(number: signal.Signals) -> None:
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(number, signal.SIG_DFL)  # under nohup the tests ignore it, and so would what they start
        os.execve(sys.executable, [sys.executable, "-c", DRAWING], {**os.environ, "TERM": "xterm"})
    seen = read(terminal, b"<drawn>")
    assert HIDDEN in seen
    os.kill(child, number)
    seen += read(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -number
    assert seen.rindex(SHOWN) > seen.rindex(HIDDEN)
