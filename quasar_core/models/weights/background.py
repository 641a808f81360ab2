"""Do work beside the program, one piece after another, in a thread that does not keep the program from ending.

Threads of Python's own pools are waited for when a program ends: Ctrl-C while a slow disk is read would take as long as
the reads that were asked for. A thread that Python ends in the middle of PyTorch's C++, on the other hand, ends the
program with an abort. So what has not begun is left out, and what has begun is waited for, but not for long: what takes
longer waits for the disk, where a thread may be ended.
"""

import atexit
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

PATIENCE = 1.0  # seconds that a program which ends waits for work that has begun

T = TypeVar("T")
_Work = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]


class Background:
    """A thread that ends with this object."""

    def __init__(self, name: str) -> None:
        self._waiting: SimpleQueue[_Work | None] = SimpleQueue()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=_do_in_turn, args=(self._waiting, self._ending), name=name, daemon=True)
        self._thread.start()
        weakref.finalize(self, self._waiting.put, None).atexit = False
        _RUNNING.add(self)

    def submit(self, work: Callable[..., T], *given: Any) -> Future[T]:
        """Have something done behind all that was asked for before; what it raises is the future's.

        Cancelled where the program ends first.
        """
        done = Future[T]()
        self._waiting.put((done, work, given))
        if self._ending.is_set():
            done.cancel()
        return done

    def end(self, patience: float) -> None:
        """Begin nothing more, and wait so many seconds for what has begun."""
        self._ending.set()
        self._waiting.put(None)
        self._thread.join(patience)


_RUNNING: weakref.WeakSet[Background] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    for background in list(_RUNNING):
        background.end(PATIENCE)


def _do_in_turn(waiting: "SimpleQueue[_Work | None]", ending: threading.Event) -> None:
    while (one := waiting.get()) is not None:
        done, work, given = one
        if ending.is_set():
            done.cancel()
        elif done.set_running_or_notify_cancel():
            try:
                done.set_result(work(*given))
            except BaseException as error:  # whoever waits is told
                done.set_exception(error)
        del one, done, work, given  # or the last work's objects would live until the next
