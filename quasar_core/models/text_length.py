"""Rotary embeddings whose frequencies depend on the text's length: dynamic NTK and longrope.

Up to a limit a text has the frequencies of training. Beyond it, a token is rotated as the text that ends with it has
it, and a prompt's tokens all as the whole prompt has it; that is what transformers' `generate` does, whose first pass
is the prompt and each later one a token. Here a pass may be a piece of a prompt or several drafted tokens.
Letters: P tokens of a prompt.
"""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable


@runtime_checkable
class TextCache(Protocol):
    """A cache that wants to know how long the prompt is."""

    def begin(self, prompt_length: int) -> int:
        """A text with a prompt of this many tokens begins; how many of the positions written are right in it too."""
        ...


def begin_text(cache: object, prompt_length: int, kept: int) -> int:
    """Tell the cache, which holds the first `kept` tokens of the text, of its prompt; how many of them stay."""
    return cache.begin(prompt_length) if isinstance(cache, TextCache) else kept


class PromptLength:
    """What a cache remembers of the prompt; a base of caches that have a `length` and a `rollback`."""

    limit: int | None = None  # of texts with the frequencies of training; None where all have them
    prompt_length = 0

    def begin(self, prompt_length: int) -> int:
        """See `TextCache`: beyond the limit, keys were rotated as another prompt has it."""
        if self.limit is not None and max(self.prompt_length, prompt_length) > self.limit:
            self.rollback(0)
        self.prompt_length = prompt_length
        return self.length

    @property
    def length(self) -> int:
        """Positions written."""
        raise NotImplementedError

    def rollback(self, length: int) -> None:
        """Forget the positions from `length` on."""
        raise NotImplementedError


def spans(start: int, end: int, prompt_length: int, limit: int) -> Iterator[tuple[int, int, int]]:
    """The positions of a pass in runs of one text length, which is `limit` for all texts up to it."""
    shared = max(prompt_length, limit)
    if start < shared:
        yield start, min(end, shared), shared
    for position in range(max(start, shared), end):
        yield position, position + 1, position + 1
