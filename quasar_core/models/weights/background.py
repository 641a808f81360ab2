"""Do work beside the program, one piece after another, in a thread that does not keep the program from ending.

Threads of Python's own pools are waited for when a program ends: Ctrl-C while a slow disk is read would take as long as
the reads that were asked for. A thread that Python ends in the middle of PyTorch's C++, on the other hand, ends the
program with an abort. So what has not begun is left out, and what has begun is waited for, but not for long: what takes
longer waits for the disk, where a thread may be ended.

A fork of the program has its memory and none of its threads: there a new thread does what is asked for from then on.
"""

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from quasar_core.errors import QuasarError

PATIENCE = 1.0  # seconds that a program which ends waits for all work that has begun

T = TypeVar("T")
_Work = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]


class Background:
    """A thread that ends with this object."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._asked = weakref.WeakSet[Future[Any]]()
        self._begin()
        _RUNNING.add(self)

    def _begin(self) -> None:
        self._waiting: SimpleQueue[_Work | None] = SimpleQueue()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None  # begun by the first work: a fork that asks for none has none
        self._beginning = threading.Lock()

    def submit(self, work: Callable[..., T], *given: Any) -> Future[T]:
        """Have something done behind all that was asked for before; what it raises is the future's.

        Cancelled where the program ends first.
        """
        done = Future[T]()
        self._asked.add(done)
        self._waiting.put((done, work, given))
        self._ensure_thread()
        if self._ending.is_set():
            done.cancel()
        return done

    def _ensure_thread(self) -> None:
        with self._beginning:
            if self._thread is None:
                given = (self._waiting, self._ending)
                self._thread = threading.Thread(target=_do_in_turn, args=given, name=self._name, daemon=True)
                self._thread.start()
                weakref.finalize(self, self._waiting.put, None).atexit = False

    def begin_ending(self) -> None:
        """Begin nothing more."""
        self._ending.set()
        self._waiting.put(None)

    def await_end(self, patience: float) -> None:
        """Wait so many seconds for what has begun."""
        if self._thread is not None:
            self._thread.join(patience)

    def begin_anew(self) -> None:
        """In a fork: what was asked for before it has failed."""
        for future in self._asked:
            if not future.done():
                Future.__init__(future)  # its lock may be held by a thread that is not there any more
                future.set_exception(Forked())
        self._begin()


class Forked(QuasarError):
    """Work that was asked for before a fork is not done in it."""

    def __init__(self) -> None:
        super().__init__("The program was forked in the middle of reading weights: ask again.")


_RUNNING: weakref.WeakSet[Background] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    running, until = list(_RUNNING), time.monotonic() + PATIENCE
    for background in running:
        background.begin_ending()
    for background in running:
        background.await_end(max(until - time.monotonic(), 0))


def _begin_anew() -> None:
    for background in list(_RUNNING):
        background.begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


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
