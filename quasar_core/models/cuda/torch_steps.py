"""The steps of a short pass whose position is read from the device, so that one recording of them serves any position.

Two makers of the same steps: PyTorch's operations, which run anywhere, and Triton's kernels (`triton_steps.py`), a
handful of launches per layer. Every step allocates its result and never waits for the device. Letters: T tokens of a
pass, H key-value heads, G query heads per key-value head, D head size, C capacity of the cache, I size of the MLP.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import linear

from quasar_core.kernels.base import RoundedRows
from quasar_core.models.base import NO_TOKEN, likeliest_in_torch
from quasar_core.models.cuda.graphs import GreedyOutput, TreeInputs
from quasar_core.models.decoder.activations import activated
from quasar_core.models.decoder.attention import FOLDED_TOKENS, AttentionMask, attend
from quasar_core.models.decoder.heads import Tables, Turn, normed
from quasar_core.models.decoder.layer import Linear

Rows = torch.Tensor | RoundedRows  # [T, in]
Gated = Callable[[Rows], Rows]


@dataclass(frozen=True)
class Activation:
    """What an MLP does between its products, beside which gates stand or not; `weights` of xIELU."""

    name: str = "silu"
    gated: bool = True
    weights: torch.Tensor | None = None


SILU = Activation()


class Steps(Protocol):
    """What a pass is made of, beside the products that have kernels of their own."""

    name: str

    def launching(self) -> AbstractContextManager[None]:
        """The context in which the steps of a pass are launched."""
        ...

    def bound(self, length: int, capacity: int) -> int:
        """Up to which length the launches of a pass that ends at `length` serve others too; `capacity` is the most."""
        ...

    def normed(
        self,
        hidden: torch.Tensor,
        delta: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        number: torch.dtype | None = None,
    ) -> Rows:
        """Add `delta` to `hidden` [T, in] in place, then its RMS norm times `weight` → [T, in].

        Where the product that reads it takes rows in an 8-bit `number`, it may come rounded to that.
        """
        ...

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        turn: Turn,
        tables: Tables | None,
        position: torch.Tensor,
        states: torch.Tensor,
        tree: TreeInputs | None = None,
    ) -> torch.Tensor:
        """Norm and rotate queries and keys of qkv [T, (H·G + 2·H)·D], write keys and values into states [2, H, C, D]
        at `position` [1] and behind it → queries [T, H·G, D]. `tables` are cosines and sines [positions, D]; the nodes
        of a tree are rotated by their depths.
        """
        ...

    def turn_and_attend(
        self,
        qkv: torch.Tensor,
        turn: Turn,
        tables: Tables | None,
        position: torch.Tensor,
        states: torch.Tensor,
        mask: Any,
        scale: float | None = None,
        cap: float | None = None,
        tree: TreeInputs | None = None,
    ) -> torch.Tensor:
        """`rotate_and_store`, then `attend` → [T, H·G·D]."""
        return self.attend(self.rotate_and_store(qkv, turn, tables, position, states, tree), states, mask, scale, cap)

    def make_mask(
        self,
        position: torch.Tensor,
        length: int,
        count: int,
        window: int | None,
        group: int,
        tree: TreeInputs | None = None,
    ) -> Any:
        """What `count` tokens at `position` see of the first `length` positions; made once for a pass.

        A node of a tree sees what is before the tree, its ancestors and itself.
        """
        ...

    def attend(
        self,
        queries: torch.Tensor,
        states: torch.Tensor,
        mask: Any,
        scale: float | None = None,
        cap: float | None = None,
    ) -> torch.Tensor:
        """Queries [T, H·G, D] over states [2, H, C, D] → [T, H·G·D]; `scale` and `cap` as in `decoder/attention.py`."""
        ...

    def gated(self, gate_up: torch.Tensor, number: torch.dtype | None = None, activation: Activation = SILU) -> Rows:
        """activation(gate) · up of gate_up [T, 2·I] → [T, I]; of `number` as in `normed`."""
        ...

    def gated_product(self, product: Linear, rows: int) -> Gated | None:
        """x [rows, in] → [rows, I] in one launch: a product of gates and what they gate, and SiLU; None without."""
        ...

    def dense_products(self, rows: int) -> dict[str, Any]:
        """Ways to multiply x [rows, in] by a weight [out, in] (and add a bias [out]) in 16 or 32 bits, by name."""
        ...

    def choose(self, logits: torch.Tensor, tokens: torch.Tensor, drafted: torch.Tensor, output: GreedyOutput) -> None:
        """The best token of each row of logits [T, V], as `models/base.py` has it, and how many of the `drafted` [1]
        tokens behind the first of tokens [T] they confirm, into `output`.
        """
        ...

    def find_likeliest(self, logits: torch.Tensor, likeliest: torch.Tensor) -> None:
        """The tokens of the best logits of each row of [T, V], as `models/base.py` has them, into int32 [T, K]."""
        ...


SHORTEST_BUCKET, GROWTH = 1024, 4


def length_bucket(length: int, capacity: int) -> int:
    """A bound on positions that few graphs share: 1024, four times that, and so on, at most all of them."""
    bucket = SHORTEST_BUCKET
    while bucket < length:
        bucket *= GROWTH
    return min(bucket, capacity)


class TorchSteps(Steps):
    """PyTorch's operations. Attention reads all of `length`, masked beyond the position."""

    name = "PyTorch's operations"

    def launching(self) -> AbstractContextManager[None]:
        """Nothing special."""
        return nullcontext()

    def bound(self, length: int, capacity: int) -> int:
        """See `Steps`: what attention reads, so a bucket."""
        return length_bucket(length, capacity)

    def normed(
        self,
        hidden: torch.Tensor,
        delta: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        number: torch.dtype | None = None,
    ) -> Rows:
        """See `Steps`; never rounded."""
        if delta is not None:
            hidden += delta
        return normed(hidden, weight, eps)

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        turn: Turn,
        tables: Tables | None,
        position: torch.Tensor,
        states: torch.Tensor,
        tree: TreeInputs | None = None,
    ) -> torch.Tensor:
        """See `Steps`."""
        kv_heads, size = states.shape[1], states.shape[-1]
        heads = qkv.view(qkv.shape[0], -1, size)  # [T, H·G + 2·H, D]
        places = position + torch.arange(qkv.shape[0], device=qkv.device)
        turned = places if tree is None else position + tree.depths
        own = tables and tuple(table.index_select(0, turned)[:, None] for table in tables)
        if turn.shares:
            return turn(heads, own)  # type: ignore[arg-type]
        rotated = turn(heads[:, :-kv_heads], own)  # type: ignore[arg-type]
        written = torch.stack((rotated[:, -kv_heads:], turn.values(heads[:, -kv_heads:])))  # [2, T, H, D]
        states.index_copy_(2, places, written.transpose(1, 2))
        return rotated[:, :-kv_heads]

    def make_mask(
        self,
        position: torch.Tensor,
        length: int,
        count: int,
        window: int | None,
        group: int,
        tree: TreeInputs | None = None,
    ) -> Any:
        """A mask over the whole length."""
        seen = torch.arange(length, device=position.device)
        if tree is None:
            own = (position + torch.arange(count, device=position.device))[:, None]
            visible = seen <= own
        else:
            own = (position + tree.depths)[:, None]
            node = seen - position
            known = node.clamp(0, count - 1)
            visible = (node < 0) | ((node < count) & (tree.families[:, None] >> known & 1).bool())
            seen = torch.where(node < 0, seen, position + tree.depths[known])
        if window is not None:
            visible &= seen > own - window
        mask = visible.repeat_interleave(group, 0) if count <= FOLDED_TOKENS else visible
        return AttentionMask(0, length, causal=False, added=mask)

    def attend(
        self,
        queries: torch.Tensor,
        states: torch.Tensor,
        mask: Any,
        scale: float | None = None,
        cap: float | None = None,
    ) -> torch.Tensor:
        """See `Steps`."""
        return attend(queries, states, mask, scale, cap)

    def gated(self, gate_up: torch.Tensor, number: torch.dtype | None = None, activation: Activation = SILU) -> Rows:
        """See `Steps`; never rounded."""
        return activated(gate_up, activation.name, activation.gated, activation.weights)

    def gated_product(self, product: Linear, rows: int) -> Gated | None:
        """There is none."""
        return None

    def dense_products(self, rows: int) -> dict[str, Any]:
        """PyTorch's own: cuBLAS on CUDA."""
        return {"torch": linear}

    def choose(self, logits: torch.Tensor, tokens: torch.Tensor, drafted: torch.Tensor, output: GreedyOutput) -> None:
        """See `Steps`."""
        best = logits.topk(2, dim=-1).values
        output.tokens.copy_(torch.where(best[:, 0].isfinite(), logits.argmax(dim=-1), NO_TOKEN))
        output.best.copy_(best[:, 0])
        output.second.copy_(best[:, 1])
        place = torch.arange(len(tokens) - 1, device=tokens.device)
        confirmed = (output.tokens[:-1] == tokens[1:]) & (place < drafted)
        output.accepted.copy_(confirmed.cumprod(0).sum())

    def find_likeliest(self, logits: torch.Tensor, likeliest: torch.Tensor) -> None:
        """See `Steps`."""
        likeliest.copy_(likeliest_in_torch(logits, likeliest.shape[1]))
