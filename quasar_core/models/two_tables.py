"""A cache for texts whose rotation changes as a whole where they grow beyond a limit (Phi-3 with 128k positions).

Up to the limit all keys are rotated by one table, beyond it all by another; so there everything is computed anew, as
transformers' `generate` does. A draft may lie on both sides and be refused, so both are kept.
"""

from collections.abc import Callable, Iterator, Sequence

from quasar_core.errors import QuasarError
from quasar_core.models.decoder_cache import DecoderCache
from quasar_core.models.hidden_rows import Rows

PIECE = 512  # tokens that are passed anew at a time

Write = Callable[[Sequence[int], DecoderCache], object]  # passes tokens, for their keys and values alone


class TwoTableCache:
    """Implements `models.base.KVCache`. Each of the two may lag behind the text, and is brought up before a pass.

    A position depends on the tokens before it and on the table alone, so all of a text that begins alike stays.
    """

    rows: Rows | None = None

    def __init__(self, short: DecoderCache, long: DecoderCache, limit: int, write: Write) -> None:
        self._short, self._long, self._limit, self._write = short, long, limit, write
        self._long.prompt_length = limit + 1  # of a long text from its first position on
        self.tokens: list[int] = []
        self.prompt_length = 0

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
        self._short.rollback(min(length, self._short.length))
        kept = min(length, self._long.length)
        # What is passed anew is so in the same pieces whatever was refused: in 16 bits their sizes decide last bits.
        self._long.rollback(kept if kept >= self._limit else kept // PIECE * PIECE)

    def runs(self, tokens: Sequence[int]) -> Iterator[tuple[Sequence[int], DecoderCache]]:
        """The tokens of a pass in runs of one table, each with the cache to pass it over; it is then part of the text.

        A prompt beyond the limit is a long text from its first token on.
        """
        start, end = self.length, self.length + len(tokens)
        middle = start if self.prompt_length > self._limit else min(max(start, self._limit), end)
        for begin, stop, one in ((start, middle, self._short), (middle, end, self._long)):
            if begin < stop:
                while one.length < begin:
                    self._write(self.tokens[one.length : min(one.length + PIECE, begin)], one)
                run = tokens[begin - start : stop - start]
                yield run, one
                self.tokens += run
