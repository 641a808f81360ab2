"""Write to the terminal: results on stdout, everything else (progress, statistics, errors) on stderr.

Colours and bars appear only in a terminal, and colours not where NO_COLOR is set (rich sees to both).
"""

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from quasar_core.errors import foreign_errors
from quasar_core.records import Progress

# In a file or a pipe nothing is to be folded for want of columns.
_WIDTH_WITHOUT_TERMINAL = 200
_UNWRITABLE = "The output cannot be written"
_ENDS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows lacks the second


def _console(stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH_WITHOUT_TERMINAL
    return console


def _draw(console: Console, *renderables: RenderableType) -> None:
    """Print text with rich's markup, and tables; in a file or a pipe no line ends in the blanks that fill a table."""
    for renderable in renderables:
        if console.is_terminal:
            console.print(renderable)
            continue
        with console.capture() as drawn:
            console.print(renderable)
        console.file.write("\n".join(line.rstrip(" ") for line in drawn.get().split("\n")))
        console.file.flush()


def show(*renderables: RenderableType) -> None:
    """Print results on stdout: text with rich's markup, tables."""
    with foreign_errors(_UNWRITABLE):
        _draw(_console(stderr=False), *renderables)


def show_plain(text: str) -> None:
    """Print text on stdout as it is: no markup is read in it, nothing is folded."""
    with foreign_errors(_UNWRITABLE):
        _console(stderr=False).print(text, markup=False, soft_wrap=True)


def has_colours() -> bool:
    """Whether stdout shows colours: a terminal, and NO_COLOR is not set."""
    found = _console(stderr=False)
    return found.is_terminal and not found.no_color and found.color_system is not None


def note(*renderables: RenderableType) -> None:
    """Print what accompanies a result on stderr."""
    _draw(_console(stderr=True), *renderables)


def note_plain(text: str) -> None:
    """Print text on stderr as it is: no markup is read in it, nothing is folded."""
    _console(stderr=True).print(text, markup=False, soft_wrap=True)


def stream_text(text: str) -> None:
    """Write generated text to stdout at once, exactly as it is."""
    with foreign_errors(_UNWRITABLE):
        sys.stdout.write(text)
        sys.stdout.flush()


def print_json(document: Any) -> None:
    """Print the one JSON document of `--json` on stdout."""
    stream_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def print_error(sentence: str) -> None:
    """Print one sentence on stderr."""
    console = _console(stderr=True)
    console.print("[bold red]Error:[/] ", end="")
    console.print(sentence, markup=False, soft_wrap=True)


def print_traceback(error: BaseException) -> None:
    """Print where an error came from on stderr."""
    traceback.print_exception(error, file=sys.stderr)


def confirm(question: str) -> bool:
    """Ask for a yes on stderr; no answer is a no."""
    _console(stderr=True).print(f"{question} [y/N] ", end="", markup=False, soft_wrap=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A Progress that draws a bar with an ETA for each stage on stderr; without a terminal, a line for each stage."""
    console = _console(stderr=True)
    if not console.is_terminal:
        yield _stage_lines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with _cursor_is_left(console), Bars(*columns, console=console, transient=True) as bars:
        yield _stage_bars(bars)


@contextmanager
def _cursor_is_left(console: Console) -> Iterator[None]:
    """Show the cursor again, which bars hide: when they end, also as they begin, and where a signal ends all of it."""

    def end(number: int, frame: Any) -> None:
        console.show_cursor(True)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    is_main = threading.current_thread() is threading.main_thread()
    ends = [number for number in _ENDS if is_main and signal.getsignal(number) is signal.SIG_DFL]
    for number in ends:
        signal.signal(number, end)
    try:
        yield
    finally:
        console.show_cursor(True)
        for number in ends:
            signal.signal(number, signal.SIG_DFL)


def _stage_lines(console: Console) -> Progress:
    announced: set[str] = set()

    def report(stage: str, done: int, total: int) -> None:
        if stage not in announced:
            announced.add(stage)
            console.print(f"{stage} ...", markup=False, soft_wrap=True)

    return report


def _stage_bars(bars: Bars) -> Progress:
    stages: dict[str, Any] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in stages:
            stages[stage] = bars.add_task(stage, total=total)
        bars.update(stages[stage], completed=done, total=total)

    return report
