"""The narrow interface between decoding and models: a pass over T tokens, and a cache whose length moves back.

Shapes: T tokens of a pass, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch


@dataclass(frozen=True)
class Choices:
    """The token of each row of a pass; its margin, the difference of the two best logits in nats, where asked for.

    `accepted` is how many of the pass's own tokens, behind the first, its choices confirm, where the device counted.
    """

    tokens: list[int]
    margins: list[float]
    accepted: int | None = None


class KVCache(Protocol):
    """Keys and values of the tokens passed so far. Target and verifier share one."""

    @property
    def length(self) -> int:
        """Positions written."""
        ...

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        ...

    def rollback(self, length: int) -> None:
        """Forget the positions from `length` on: the length moves, nothing is copied."""
        ...


class CausalLM(Protocol):
    """A model that runs passes."""

    @property
    def vocab_size(self) -> int:
        """V, the width of the logits."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the logits live."""
        ...

    def new_cache(self, capacity: int) -> Any:
        """An empty cache with room for `capacity` positions."""
        ...

    def forward(self, tokens: Sequence[int], cache: Any, last_only: bool = False) -> torch.Tensor:
        """One pass over `tokens` at position `cache.length`, which moves on by T.

        Returns float32 logits [T, V], or [1, V] of the last token with `last_only`.
        """
        ...


@runtime_checkable
class ChoosingLM(Protocol):
    """A model whose passes may make the greedy choices on the device, so that no logits need be read."""

    def choose(self, tokens: Sequence[int], cache: Any) -> Choices | None:
        """One pass as `forward` runs it, and its choices, all of their fields; None, and no pass, where it cannot."""
        ...


class FastPass(Protocol):
    """Runs those passes of one decoder that are short enough, near their floor."""

    name: str
    longest: int  # tokens of a pass

    def run(self, tokens: Sequence[int], cache: Any) -> torch.Tensor:
        """One pass at position `cache.length`, which moves on by T → float32 logits [T, V]."""
        ...


@runtime_checkable
class ChoosingPass(Protocol):
    """A fast pass that makes the greedy choices itself."""

    def choose(self, tokens: Sequence[int], cache: Any) -> Choices:
        """One pass at position `cache.length`, which moves on by T, and its choices, all of their fields."""
        ...


def leave_choices(logits: torch.Tensor, tokens: list[int], margins: list[float]) -> None:
    """Note at logits [T, V] what was found while they were computed: of each row the best token, and its margin.

    Not at those of inference mode, where a later change of the logits could not be told.
    """
    if not logits.is_inference():
        logits.chosen = tokens, margins, logits._version  # type: ignore[attr-defined]


def choices_left(logits: torch.Tensor) -> tuple[list[int], list[float]] | None:
    """What `leave_choices` noted; None where nothing was, or where the logits have been changed since."""
    noted = getattr(logits, "chosen", None)
    return noted[:2] if noted and noted[2] == logits._version else None
