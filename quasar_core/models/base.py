"""The narrow interface between decoding and models: a pass over T tokens, its choices, and a cache that rolls back.

The token that each row of a pass chooses, and how sure it is, come over from the device in one transfer.
Letters: T tokens (rows) of a pass, V vocabulary.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from quasar_core.errors import QuasarError
from quasar_core.kernels.triton.adapters import why_not_triton

NO_TOKEN = -1  # the choice of a row whose best logit is not a finite number
NOT_NUMBERS = "The model's logits are not numbers"


@dataclass(frozen=True)
class Choices:
    """The token of each row of a pass, or `NO_TOKEN`; its margin, the difference of the two best logits in nats.

    `margins` may be left out. `accepted` is how many of the pass's own tokens, behind the first, its choices confirm,
    where the device counted.
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


def choose_best(logits: torch.Tensor) -> Choices:
    """The best token of each row of logits [T, V] and its margin, on the host."""
    return bring_over(*best_tokens(logits))


def best_tokens(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row of logits [T, V] the best token, of equal ones the first, and its margin → [T] and [T]."""
    if logits.device.type == "cpu":
        return _best_on_host(logits)
    if chooses_in_triton(logits.device):
        return _best_in_triton(logits)
    return _best_in_torch(logits)


def bring_over(tokens: torch.Tensor, margins: torch.Tensor | None = None) -> Choices:
    """Tokens [T], and margins [T] where they are asked for, in one transfer from the device."""
    if margins is None:
        return Choices(tokens.tolist(), [])
    if tokens.device.type == "cpu":
        return Choices(tokens.tolist(), margins.tolist())
    chosen, brought = torch.stack((tokens.double(), margins.double())).tolist()  # float64 holds any token id
    return Choices([int(token) for token in chosen], brought)


def join_choices(parts: Sequence[Choices]) -> Choices:
    """The choices of a pass that ran in parts."""
    if len(parts) == 1:
        return parts[0]
    tokens = [token for part in parts for token in part.tokens]
    return Choices(tokens, [margin for part in parts for margin in part.margins])


def refuse_odd_logits(logits: torch.Tensor) -> None:
    """Raise QuasarError where the best of a row of logits [T, V] is not a finite number."""
    if not logits.amax(dim=-1).isfinite().all():
        raise QuasarError(f"{NOT_NUMBERS}.")


@functools.cache
def chooses_in_triton(device: torch.device) -> bool:
    """Whether one kernel finds choice and margin: PyTorch sorts for it."""
    return why_not_triton(device, torch.bfloat16) is None


def _best_in_triton(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from quasar_core.kernels.triton.choices import argmax_and_margin

    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    best, second = torch.empty(2, len(logits), device=logits.device).unbind()
    argmax_and_margin(logits, tokens, best, second)
    return tokens, best - second


def _best_in_torch(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    best, second = logits.topk(2, dim=-1).values.unbind(dim=-1)
    return torch.where(best.isfinite(), logits.argmax(dim=-1), NO_TOKEN), best - second


def _best_on_host(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """NumPy's argmax reads a row of 152k logits in 7 µs where PyTorch's takes 88 on one core."""
    tokens, margins = [], []
    for row in logits.numpy():
        place = int(row.argmax())
        best = float(row[place])
        tokens.append(place if math.isfinite(best) else NO_TOKEN)
        before, behind = row[:place].max(initial=-np.inf), row[place + 1 :].max(initial=-np.inf)
        margins.append(best - float(max(before, behind)))
    return torch.tensor(tokens), torch.tensor(margins)
