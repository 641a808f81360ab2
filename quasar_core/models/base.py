"""The narrow interface between decoding and models: a pass over T tokens, and a cache whose length moves back.

Shapes: T tokens of a pass, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from quasar_core.models.choices import Choices, choose_best


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
    """A model that runs passes. A class that names it as its base gets `choose`, and may have a faster one."""

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

    def choose(self, tokens: Sequence[int], cache: Any) -> Choices:
        """One pass as `forward` runs it, and the best token of each row with its margin."""
        return choose_best(self.forward(tokens, cache))


class FastPass(Protocol):
    """Runs passes of up to `longest` tokens of one decoder, near their floor."""

    name: str
    longest: int

    def run(self, tokens: Sequence[int], cache: Any) -> torch.Tensor:
        """One pass at position `cache.length`, which moves on by T → float32 logits [T, V]."""
        ...

    def choose(self, tokens: Sequence[int], cache: Any) -> Choices:
        """The same pass → the best token of each row with its margin."""
        ...
