"""Hide the progress bars of other libraries, which would run beside our own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def hidden_bars() -> Iterator[None]:
    """Hide the bars that other libraries begin within: all of them draw with tqdm, whose classes share one beginning.

    Their own switches do not reach every bar: transformers' leaves that of a GGUF file.
    """
    from tqdm import std

    bar: Any = std.tqdm
    begin = bar.__init__

    def begin_hidden(self: Any, *args: Any, **options: Any) -> None:
        begin(self, *args, **{**options, "disable": True})

    bar.__init__ = begin_hidden
    try:
        yield
    finally:
        bar.__init__ = begin
