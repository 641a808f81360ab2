"""The source of the weights of a decoder's blocks: memory, or files that are read in every pass (`streaming.py`)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


class LayerSource(Protocol):
    """Gives a pass the weights of its blocks."""

    @property
    def streamed(self) -> str | None:
        """What is fetched for every pass, in words; None where all is in memory."""
        ...

    def stretches(self) -> Iterator[range]:
        """All blocks of a pass in order, in stretches; while one is yielded its weights are in their places."""
        ...


@dataclass(frozen=True)
class AllThere:
    """All weights are in memory."""

    count: int
    streamed = None

    def stretches(self) -> Iterator[range]:
        """All blocks at once."""
        yield range(self.count)
