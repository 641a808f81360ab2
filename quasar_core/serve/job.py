"""The answers of one request as they are written: the engine's thread tells, and the request's own loop reads.

The engine and whoever reads share the machine's cores, and the threads of a pass wait for the one whose core was taken.
So the loop is woken seldom: for a stream's first text, for the end of an answer, and otherwise a few times a second.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

from quasar_core.decode.answering import Stopped
from quasar_core.decode.logits.scores import TokenScore
from quasar_core.records import GenerationResult
from quasar_core.serve.asks import Ask
from quasar_core.serve.errors import ApiError
from quasar_core.trace import Maker

GATHER = 0.05  # seconds of text that come as one chunk: few wake-ups, and as fast as anybody reads
PAUSE = 10.0  # seconds without an event, after which a stream says that it is alive


@dataclass(frozen=True)
class Begun:
    """An answer begins; the scores of its prompt where they were asked for."""

    prompt_scores: Sequence[TokenScore] = ()


@dataclass(frozen=True)
class Written:
    """A piece of an answer's text, the tokens that it is made of, and their scores where they were asked for."""

    text: str
    tokens: Sequence[int]
    scores: Sequence[TokenScore] = ()
    maker: Maker | None = None  # of the last token, which finished the text, where it was asked for


@dataclass(frozen=True)
class Finished:
    """An answer is whole; without a result only its prompt was scored. Tokens without text of their own come here."""

    result: GenerationResult | None
    tokens: Sequence[int] = ()
    scores: Sequence[TokenScore] = ()


Event = Begun | Written | Finished | ApiError
Told = tuple[int, Event]  # the number of the answer, and what became of it


@dataclass
class Job:
    """The answers of one request. An ApiError is the last that is told."""

    asks: Sequence[Ask]
    loop: asyncio.AbstractEventLoop
    timeout: float
    received: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    _told: list[Told] = field(default_factory=list)  # and not taken yet
    _waiter: asyncio.Future[None] | None = None
    _waits_for_end: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def emit(self, number: int, event: Event) -> None:
        """Tell, from the computing thread; wakes the loop only where it waits for such an event."""
        if self.cancelled:
            return
        with self._lock:
            self._told.append((number, event))
            waiter = self._waiter if self._is_due() else None
        if waiter is not None:
            self.loop.call_soon_threadsafe(_resolve, waiter)

    def before_pass(self) -> None:
        """End where nobody reads, or the time is over."""
        if self.cancelled:
            raise Stopped
        if time.monotonic() - self.received > self.timeout:
            raise ApiError(504, f"The answer took longer than {self.timeout:g} seconds.", code="timeout")

    async def wait(self, seconds: float | None, for_end: bool = False) -> None:
        """Wait until something was told that is not taken yet; with `for_end`, until that is the end of an answer.

        No longer than so many seconds. For the loop alone.
        """
        waiter = self.loop.create_future()
        with self._lock:
            self._waiter, self._waits_for_end = waiter, for_end
            if self._is_due():
                return
        timer = None if seconds is None else self.loop.call_later(seconds, _resolve, waiter)
        try:
            await waiter
        finally:
            if timer is not None:
                timer.cancel()

    def take(self) -> list[Told]:
        """What was told since the last time."""
        with self._lock:
            told, self._told, self._waiter = self._told, [], None
        return told

    def _is_due(self) -> bool:
        """Whether what is waited for is there: an end is the last that is told before others begin."""
        if self._waits_for_end:
            return any(isinstance(event, Finished | ApiError) for _, event in self._told[-1:])
        return bool(self._told)


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


async def read_events(job: Job, stream: bool) -> AsyncIterator[list[Told]]:
    """What was told of a request's answers, until all are whole: in a stream soon, else when an answer has ended.

    In a stream, an empty list where nothing came for a while. Raises the ApiError of an answer that failed.
    """
    left = len(job.asks)
    while left:
        await job.wait(PAUSE if stream else None, for_end=not stream)
        told = job.take()
        error = told[-1][1] if told and isinstance(told[-1][1], ApiError) else None
        yield told if error is None else told[:-1]
        if error is not None:
            raise error
        left -= sum(isinstance(event, Finished) for _, event in told)
        if stream and left and any(isinstance(event, Written) for _, event in told):
            await job.wait(GATHER, for_end=True)


def by_answer(told: Sequence[Told]) -> Iterator[tuple[int, list[Event]]]:
    """The events of each answer, which are written one after another."""
    for number, group in groupby(told, key=itemgetter(0)):
        yield number, [event for _, event in group]
