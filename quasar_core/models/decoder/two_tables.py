"""Caches for texts whose rotation changes as a whole where they grow beyond a limit (Phi-3 with 128k positions).

Up to the limit all keys are rotated by one table, beyond it all by another; so there everything is computed anew, as
transformers' `generate` does. A draft may lie on both sides and be refused, so both are kept.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from quasar_core.errors import QuasarError
from quasar_core.models.base import KVCache
from quasar_core.models.decoder.cache import DecoderCache
from quasar_core.models.decoder.hidden_rows import Rows

PIECE = 512  # tokens that are passed anew at a time

Write = Callable[[Sequence[int], DecoderCache], object]  # passes tokens, for their keys and values alone
Buffer = TypeVar("Buffer", bound=KVCache)


class TwoBuffers(Generic[Buffer]):
    """A text, and its keys and values by either table: each of the two may lag behind it.

    Implements `models.base.KVCache`. A position depends on the tokens before it and on the table alone, so all of a
    text that begins alike stays.
    """

    def __init__(self, short: Buffer, long: Buffer, limit: int) -> None:
        self.limit, self.prompt_length = limit, 0
        self.tokens: list[int] = []
        self._short, self._long = short, long

    @property
    def length(self) -> int:
        """Positions written."""
        return len(self.tokens)

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return self._long.capacity

    def check_room(self, count: int) -> None:
        """Refuse a pass that would not fit."""
        if self.length + count > self.capacity:
            raise QuasarError(f"The cache holds {self.capacity} tokens, and {self.length + count} are needed.")

    def begin(self, prompt_length: int) -> int:
        """See `TextCache`."""
        self.prompt_length = prompt_length
        return self.length

    def rollback(self, length: int) -> None:
        """Move the length back; a length ahead of what is written is a defect of the caller."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot move a cache of {self.length} positions to {length}")
        del self.tokens[length:]
        for buffer in (self._short, self._long):
            buffer.rollback(min(length, buffer.length))


class TwoTableCache(TwoBuffers[DecoderCache]):
    """The two of a decoder of our own; the one that a pass goes over is brought up to the text before it."""

    rows: Rows | None = None

    def __init__(self, short: DecoderCache, long: DecoderCache, limit: int, write: Write) -> None:
        super().__init__(short, long, limit)
        self._write = write
        self._long.prompt_length = limit + 1  # of a long text from its first position on

    def rollback(self, length: int) -> None:
        """See above. What is passed anew has the same pieces whatever was refused, as their sizes decide last bits."""
        super().rollback(length)
        kept = self._long.length
        self._long.rollback(kept if kept >= self.limit else kept // PIECE * PIECE)

    def runs(self, tokens: Sequence[int]) -> Iterator[tuple[Sequence[int], DecoderCache]]:
        """The tokens of a pass in runs of one table, each with the cache to pass it over; it is then part of the text.

        A prompt beyond the limit is a long text from its first token on.
        """
        start, end = self.length, self.length + len(tokens)
        middle = start if self.prompt_length > self.limit else min(max(start, self.limit), end)
        for begin, stop, one in ((start, middle, self._short), (middle, end, self._long)):
            if begin < stop:
                while one.length < begin:
                    self._write(self.tokens[one.length : min(one.length + PIECE, begin)], one)
                run = tokens[begin - start : stop - start]
                yield run, one
                self.tokens += run


AnyCache = DecoderCache | TwoTableCache


def runs_of(tokens: Sequence[int], cache: AnyCache) -> Iterable[tuple[Sequence[int], DecoderCache]]:
    """The tokens of a pass in runs that are rotated alike, each with the cache that it is passed over."""
    return cache.runs(tokens) if isinstance(cache, TwoTableCache) else [(tokens, cache)]
