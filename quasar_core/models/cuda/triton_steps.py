"""The steps of a short pass as Triton's kernels: one launch each, and two for attention, or where it is joined one.

Letters: T tokens of a pass, H key-value heads, G query heads per key-value head, D head size.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear

from quasar_core.kernels.base import RoundedRows
from quasar_core.kernels.linear import PackedLinear
from quasar_core.kernels.triton.attention import attend
from quasar_core.kernels.triton.blocks import why_not_gated
from quasar_core.kernels.triton.choices import accept_greedy, argmax_and_margin, likeliest_tokens
from quasar_core.kernels.triton.elementwise import (
    rms_norm_residual,
    silu_multiply,
    silu_multiply_rounded,
)
from quasar_core.kernels.triton.language import overlapping
from quasar_core.kernels.triton.packed import LONGEST, multiply_packed
from quasar_core.kernels.triton.products import LONGEST_DENSE, multiply_dense
from quasar_core.kernels.triton.rotation import Rotation, rotate_and_store
from quasar_core.kernels.triton.shares import attention_workspace
from quasar_core.kernels.triton.weights import TritonWeight
from quasar_core.models.cuda.graphs import GreedyOutput, TreeInputs
from quasar_core.models.cuda.torch_steps import SILU, Activation, Gated, Rows
from quasar_core.models.decoder.activations import activated
from quasar_core.models.decoder.heads import Tables, Turn
from quasar_core.models.decoder.layer import DenseLinear, Linear

WIDEST = 16  # tokens of one launch of attention; a longer pass takes several


@dataclass(frozen=True)
class TritonMask:
    """Where the pass stands: the position of each launch's first token, on the device, and a bound on the length."""

    positions: tuple[torch.Tensor, ...]
    length: int
    window: int | None
    tree: TreeInputs | None


@dataclass(frozen=True)
class Joined:
    """Which launches attention takes in: the rotation, and the merge of passes of up to so many tokens."""

    turns: bool = False
    merges: int = 0


APART = Joined()


class TritonSteps:
    """Implements `torch_steps.Steps` in 16 bits; a launch may begin before the one before it has ended."""

    name = "Triton"

    def __init__(self, overlaps: bool = False, joined: Joined = APART) -> None:
        self.overlaps, self.joined = overlaps, joined

    def launching(self) -> AbstractContextManager[None]:
        """See `kernels/triton/language.py`."""
        return overlapping(self.overlaps)

    def bound(self, length: int, capacity: int) -> int:
        """See `Steps`: attention reads its length from the device, and one graph serves every length."""
        return capacity

    def normed(
        self,
        hidden: torch.Tensor,
        delta: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        number: torch.dtype | None = None,
    ) -> Rows:
        """One launch, however many tokens."""
        if number is None:
            out = torch.empty_like(hidden)
            rms_norm_residual(hidden, delta, weight, eps, out)
            return out
        rows = _empty_rows(hidden.shape[0], hidden.shape[1], number, hidden.device)
        rms_norm_residual(hidden, delta, weight, eps, rows.codes, rows.scales)
        return rows

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        turn: Turn,
        tables: Tables | None,
        position: torch.Tensor,
        states: torch.Tensor,
        tree: TreeInputs | None = None,
    ) -> torch.Tensor:
        """One launch, however many tokens; norms of whole rows are PyTorch's."""
        keys, values = states.unbind()
        if turn.shares:  # queries alone: nothing is kept
            keys = keys[:0]
        qkv = _normed_in_torch(qkv, turn, len(keys), states.shape[-1])
        queries = qkv.new_empty(qkv.shape[0], turn.queries, states.shape[-1])
        depths = None if tree is None else tree.depths
        rotate_and_store(qkv, _rotation(turn, tables), position, keys, values, queries, depths)
        return queries

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
        """One launch for every sixteen tokens, or two or three: see `Joined`."""
        if not self.joined.turns:
            queries = self.rotate_and_store(qkv, turn, tables, position, states, tree)
            return self.attend(queries, states, mask, scale, cap)
        qkv = _normed_in_torch(qkv, turn, 0 if turn.shares else states.shape[1], states.shape[-1])
        return self._attend(qkv, states, mask, scale, cap, turn.queries, _rotation(turn, tables))

    def make_mask(
        self,
        position: torch.Tensor,
        length: int,
        count: int,
        window: int | None,
        group: int,
        tree: TreeInputs | None = None,
    ) -> Any:
        """A position for every sixteen tokens; a tree has no more."""
        positions = (position + begin if begin else position for begin in range(0, count, WIDEST))
        return TritonMask(tuple(positions), length, window, tree)

    def attend(
        self,
        queries: torch.Tensor,
        states: torch.Tensor,
        mask: Any,
        scale: float | None = None,
        cap: float | None = None,
    ) -> torch.Tensor:
        """Two launches for every sixteen tokens, or one."""
        return self._attend(queries, states, mask, scale, cap, queries.shape[1], None)

    def _attend(
        self,
        queries: torch.Tensor,
        states: torch.Tensor,
        mask: Any,
        scale: float | None,
        cap: float | None,
        heads: int,
        rotation: Rotation | None,
    ) -> torch.Tensor:
        count, (keys, values), size = len(queries), states.unbind(), states.shape[-1]
        out = queries.new_empty(count, heads * size)
        tree = None if mask.tree is None else (mask.tree.depths, mask.tree.families)
        for position, rows, part in zip(mask.positions, queries.split(WIDEST), out.split(WIDEST), strict=True):
            attend(
                rows,
                keys,
                values,
                position,
                mask.window,
                attention_workspace(queries.device, len(rows), heads, size, mask.length),
                part,
                mask.length,
                scale,
                cap,
                tree,
                rotation,
                merges=count <= self.joined.merges,
            )
        return out

    def gated(self, gate_up: torch.Tensor, number: torch.dtype | None = None, activation: Activation = SILU) -> Rows:
        """One launch for SiLU; another activation is PyTorch's, and never rounded."""
        if activation != SILU:
            return activated(gate_up, activation.name, activation.gated, activation.weights)
        count, inner = gate_up.shape[0], gate_up.shape[1] // 2
        if number is None:
            out = gate_up.new_empty(count, inner)
            silu_multiply(gate_up, out)
            return out
        rows = _empty_rows(count, inner, number, gate_up.device)
        silu_multiply_rounded(gate_up, rows.codes, rows.scales)
        return rows

    def gated_product(self, product: Linear, rows: int) -> Gated | None:
        """For 16 bits, and for packed codes up to sixteen tokens."""
        weight = gated_part(product)
        is_packed = isinstance(weight, TritonWeight)
        if weight is None or rows > (LONGEST if is_packed else LONGEST_DENSE):
            return None
        assert isinstance(product, DenseLinear | PackedLinear)
        multiply = multiply_packed if is_packed else multiply_dense
        return partial(_multiply_gated, multiply, weight, product.bias)

    def dense_products(self, rows: int) -> dict[str, Any]:
        """Triton's product, whose rows do not depend on their number, and cuBLAS."""
        return {"triton": _multiply_dense, "cublas": linear} if rows <= LONGEST_DENSE else {"cublas": linear}

    def choose(self, logits: torch.Tensor, tokens: torch.Tensor, drafted: torch.Tensor, output: GreedyOutput) -> None:
        """Three launches."""
        argmax_and_margin(logits, output.tokens, output.best, output.second)
        accept_greedy(output.tokens, tokens, drafted, output.accepted)

    def find_likeliest(self, logits: torch.Tensor, likeliest: torch.Tensor) -> None:
        """Two launches."""
        likeliest_tokens(logits, likeliest)


def _normed_in_torch(qkv: torch.Tensor, turn: Turn, kv_heads: int, size: int) -> torch.Tensor:
    """qkv [T, (H·G + 2·H)·D], or queries alone, behind the norms that no kernel has: of values, and of whole rows."""
    heads = qkv.view(qkv.shape[0], -1, size)
    if kv_heads and turn.norms is not None and turn.norms.of_values:
        heads = torch.cat((heads[:, :-kv_heads], turn.values(heads[:, -kv_heads:])), 1)
    if turn.of_rows:
        turned = heads.shape[1] - kv_heads
        heads = torch.cat((turn.normed(heads[:, :turned]), heads[:, turned:]), 1)
    return heads.flatten(1)


def _rotation(turn: Turn, tables: Tables | None) -> Rotation:
    """What a kernel does to queries and keys."""
    cos, sin = tables or (None, None)
    channels, interleaved = (turn.rope.channels, turn.rope.interleaved) if turn.rope else (0, False)
    norms = None if turn.of_rows else turn.weight
    return Rotation(norms, cos, sin, turn.eps, channels, interleaved, turn.norms_last)


def _empty_rows(count: int, size: int, number: torch.dtype, device: torch.device) -> RoundedRows:
    codes = torch.empty(count, size, dtype=number, device=device)
    return RoundedRows(codes, torch.empty(count, dtype=torch.float32, device=device))


def gated_part(product: Linear) -> TritonWeight | torch.Tensor | None:
    """The weight of gates and what they gate, where one product can end with the gate; None where none can."""
    weight: TritonWeight | torch.Tensor
    if isinstance(product, DenseLinear):
        weight, outputs = product.weight, product.weight.shape[0]
    elif isinstance(product, PackedLinear) and isinstance(product.prepared, TritonWeight):
        weight, outputs = product.prepared, product.out_features
    else:
        return None
    return None if why_not_gated(outputs) else weight


def _multiply_gated(
    multiply: Callable[..., None], weight: TritonWeight | torch.Tensor, bias: torch.Tensor | None, x: Rows
) -> torch.Tensor:
    assert isinstance(x, torch.Tensor)  # a product that takes rounded rows is none of these
    outputs = weight.out_features if isinstance(weight, TritonWeight) else weight.shape[0]
    out = x.new_empty(x.shape[0], outputs // 2)
    multiply(x, weight, out, bias, gated=True)
    return out


def _multiply_dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    out = x.new_empty(x.shape[0], weight.shape[0])
    multiply_dense(x, weight, out, bias)
    return out
