"""Do work beside the program, one piece after another, in a thread that never keeps the program from ending.

Threads of Python's own pools are waited for when a program ends: Ctrl-C while a slow disk is read would take as long as
the reads that were asked for.
"""

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

_Work = tuple[Future[None], Callable[..., None], tuple[Any, ...]]


class Background:
    """A thread that ends with this object."""

    def __init__(self, name: str) -> None:
        self._waiting: SimpleQueue[_Work | None] = SimpleQueue()
        threading.Thread(target=_do_in_turn, args=(self._waiting,), name=name, daemon=True).start()
        weakref.finalize(self, self._waiting.put, None)

    def submit(self, work: Callable[..., None], *given: Any) -> Future[None]:
        """Have something done behind all that was asked for before; what it raises is the future's."""
        done = Future[None]()
        self._waiting.put((done, work, given))
        return done


def _do_in_turn(waiting: "SimpleQueue[_Work | None]") -> None:
    while (one := waiting.get()) is not None:
        done, work, given = one
        try:
            done.set_result(work(*given))
        except BaseException as error:  # whoever waits is told
            done.set_exception(error)
        del one, done, work, given  # or the last work's objects would live until the next
