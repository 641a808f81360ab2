"""The narrow interface between decoding and models: a pass over T tokens, and a cache whose length moves back.

Shapes: T tokens of a pass, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch


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
