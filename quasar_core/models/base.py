"""The narrow interface between decoding and models: a pass over T tokens, its choices, and a cache that rolls back.

The token that each row of a pass chooses, and how sure it is, come over from the device in one transfer.
Letters: T tokens (rows) of a pass, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch.nn.functional import pad

from quasar_core.errors import QuasarError
from quasar_core.kernels.gpu import on
from quasar_core.kernels.triton.adapters import why_not_triton

NO_TOKEN = -1  # the choice of a row whose best logit is not a finite number
MOST_LIKELIEST = 8  # tokens of a row that a pass lists
NOT_NUMBERS = "The model's logits are not numbers"


def go_on() -> None:
    """Let the next pass run."""


@dataclass(frozen=True)
class Choices:
    """The token of each row of a pass, or `NO_TOKEN`; its margin, the difference of the two best logits in nats.

    `margins` may be left out. `accepted` is how many of the pass's own tokens, behind the first, its choices confirm,
    where the device counted. `likeliest` holds, where they were asked for, the few tokens of each row with the best
    logits, the best first and of equal ones the lowest; `NO_TOKEN` stands for those of a row without a choice, and for
    what lies at −∞.
    """

    tokens: list[int]
    margins: list[float]
    accepted: int | None = None
    likeliest: list[list[int]] = field(default_factory=list)


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


class TreeCache(KVCache, Protocol):
    """A cache of a model through which trees pass."""

    def keep(self, start: int, nodes: Sequence[int]) -> None:
        """Keep these nodes, a path, of a tree that was passed at `start`, as the positions from `start` on."""
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

    def pass_prompt(
        self, tokens: Sequence[int], cache: Any, chunk: int, before_pass: Callable[[], None] = go_on
    ) -> torch.Tensor:
        """A prompt, `chunk` tokens of it at a time → float32 logits [1, V] of the last token.

        What `before_pass` raises ends it; the cache then holds whole chunks.
        """
        for part in in_rows(tokens, chunk):
            before_pass()
            logits = self.forward(part, cache, last_only=True)
        return logits

    def choose(self, tokens: Sequence[int], cache: Any, likeliest: int = 0) -> Choices:
        """One pass as `forward` runs it → the best token of each row, its margin, and so many `likeliest` tokens."""
        return choose_best(self.forward(tokens, cache), likeliest)

    @property
    def streamed(self) -> str | None:
        """What of its weights is fetched for every pass, in words; None where all are in memory."""
        return None

    @property
    def longest_tree(self) -> int:
        """Nodes of a tree that passes at once (SpecInfer, Miao et al., 2024, §4); 0 where none does.

        A tree is tokens with the place of each one's parent among them, −1 for the first: each sees what the cache
        holds, its ancestors and itself, as though it ended a text of its own. The cache is a `TreeCache`, which keeps a
        path of it.
        """
        return 0

    @property
    def why_chains(self) -> str | None:
        """Why no tree ever passes, where that lies in the model itself."""
        return None

    def forward_tree(self, tokens: Sequence[int], parents: Sequence[int], cache: Any) -> torch.Tensor:
        """One pass over a tree, `cache.length` moves on by T → float32 logits [T, V] behind each node's path."""
        raise RuntimeError(f"no trees pass through {type(self).__name__}")

    def choose_tree(self, tokens: Sequence[int], parents: Sequence[int], cache: Any, likeliest: int = 0) -> Choices:
        """One pass over a tree, as `forward_tree` → what `choose` gives."""
        return choose_best(self.forward_tree(tokens, parents, cache), likeliest)


class Begun(Protocol):
    """A pass that a device runs; until it is fetched its cache stays as it is."""

    @property
    def seconds(self) -> float:
        """That the device took, once it is fetched; 0 where nobody measured."""
        ...

    def fetch(self) -> Choices:
        """Wait for it, and move its cache on."""
        ...


@runtime_checkable
class BeginningPass(Protocol):
    """A `FastPass` that a device runs while the host goes on."""

    longest: int
    longest_tree: int

    def begin(
        self, tokens: Sequence[int], cache: Any, likeliest: int = 0, *, parents: Sequence[int] | None = None
    ) -> Begun:
        """Begin the pass of `choose`, of at most `longest` tokens; the cache moves on when it is fetched."""
        ...


class FastPass(Protocol):
    """Runs passes of up to `longest` tokens of one decoder, near their floor."""

    name: str
    longest: int
    longest_tree: int  # nodes of a tree that passes at once; 0 where none does
    gives_rows: bool  # whether it keeps what the head reads, where a cache wants it
    longest_prompt: int  # tokens up to which it runs a prompt's pass too; 0 where it runs none

    def run(
        self, tokens: Sequence[int], cache: Any, parents: Sequence[int] | None = None, last_only: bool = False
    ) -> torch.Tensor:
        """One pass at position `cache.length`, which moves on by T → float32 logits [T, V], [1, V] with `last_only`.

        With `parents` the tokens are a tree, see `CausalLM.longest_tree`.
        """
        ...

    def choose(
        self, tokens: Sequence[int], cache: Any, likeliest: int = 0, *, parents: Sequence[int] | None = None
    ) -> Choices:
        """One pass, as `run` → the best token of each row, its margin, and so many `likeliest` tokens."""
        ...


def choose_best(logits: torch.Tensor, likeliest: int = 0) -> Choices:
    """The best token of each row of logits [T, V], its margin, and so many `likeliest` tokens, on the host."""
    return bring_over(*best_tokens(logits), likeliest_tokens(logits, likeliest) if likeliest else [])


def depths_of(parents: Sequence[int]) -> list[int]:
    """How far below the first token each node of a tree stands; a parent stands before its children, −1 for the first.

    ValueError for what is no tree.
    """
    depths: list[int] = []
    for node, parent in enumerate(parents):
        if not -1 <= parent < node or (parent < 0) != (node == 0):
            raise ValueError(f"node {node} of a tree cannot stand behind {parent}")
        depths.append(depths[parent] + 1 if node else 0)
    return depths


def in_rows(tokens: Sequence[int], width: int) -> list[list[int]]:
    """Tokens in rows of so many, the last of what is left; empty ones for a width of 0."""
    return [list(tokens[begin : begin + width]) for begin in range(0, len(tokens), width or 1)]


def best_tokens(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best token of each row of logits [T, V], of equal ones the first, and its margin → [T] and [T]."""
    if logits.device.type == "cpu":
        return _best_on_host(logits)
    if chooses_in_triton(logits.device):
        return _best_in_triton(logits)
    return _best_in_torch(logits)


def likeliest_tokens(logits: torch.Tensor, count: int) -> list[list[int]]:
    """The `count` likeliest tokens of each row of logits [T, V], as `Choices` has them, on the host."""
    check_likeliest(count)
    if logits.device.type == "cpu":
        return [_likeliest_on_host(row, count) for row in logits.numpy()]
    return likeliest_in_torch(logits, count).tolist()


def check_likeliest(count: int) -> None:
    """ValueError where more tokens of a row are asked for than fast passes list."""
    if count > MOST_LIKELIEST:
        raise ValueError(f"a pass lists at most {MOST_LIKELIEST} tokens of a row, not {count}")


def likeliest_in_torch(logits: torch.Tensor, count: int) -> torch.Tensor:
    """The likeliest tokens on the device → int64 [T, count]. Logit and token make one whole number: none are equal."""
    width = logits.shape[-1]
    bits = (logits.float() + 0.0).view(torch.int32)  # −0 becomes 0
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # whole numbers in the order of their logits
    keys = (rising << 32) + torch.arange(width - 1, -1, -1, device=logits.device)
    best = keys.topk(min(count, width), dim=-1).values
    tokens = width - 1 - (best & 0xFFFFFFFF)
    is_choice = logits.amax(dim=-1, keepdim=True).isfinite() & (logits.gather(-1, tokens) > -torch.inf)
    missing = (0, count - tokens.shape[-1])
    return pad(torch.where(is_choice, tokens, NO_TOKEN), missing, value=NO_TOKEN)


def bring_over(
    tokens: torch.Tensor, margins: torch.Tensor | None = None, likeliest: Sequence[list[int]] = ()
) -> Choices:
    """Tokens [T], and margins [T] where they are asked for, in one transfer from the device; `likeliest` are there."""
    if margins is None:
        return Choices(tokens.tolist(), [], likeliest=[*likeliest])
    if tokens.device.type == "cpu":
        return Choices(tokens.tolist(), margins.tolist(), likeliest=[*likeliest])
    chosen, brought = torch.stack((tokens.double(), margins.double())).tolist()  # float64 holds any token id
    return Choices([int(token) for token in chosen], brought, likeliest=[*likeliest])


def join_choices(parts: Sequence[Choices]) -> Choices:
    """The choices of a pass that ran in parts."""
    if len(parts) == 1:
        return parts[0]
    tokens = [token for part in parts for token in part.tokens]
    margins = [margin for part in parts for margin in part.margins]
    return Choices(tokens, margins, likeliest=[row for part in parts for row in part.likeliest])


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
    with on(logits.device):
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


BLOCK = 64  # logits


def _likeliest_on_host(row: np.ndarray[Any, np.dtype[np.float32]], count: int) -> list[int]:
    """The best of a row lie in the blocks of the best maxima, so that few logits are sorted."""
    whole = len(row) // BLOCK * BLOCK
    maxima = np.append(row[:whole].reshape(-1, BLOCK).max(axis=1), row[whole:].max(initial=-np.inf))
    if not np.isfinite(maxima.max()):
        return [NO_TOKEN] * count
    blocks = np.sort(np.argsort(-maxima, kind="stable")[:count])
    places = (blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
    places = places[places < len(row)]
    found = row[places]
    order = np.argsort(-found, kind="stable")[:count]
    tokens: list[int] = places[order[found[order] > -np.inf]].tolist()
    return tokens + [NO_TOKEN] * (count - len(tokens))
