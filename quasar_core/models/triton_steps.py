"""The steps of a short pass as Triton's kernels: one launch each, and two for attention.

Letters: T tokens of a pass, H key-value heads, G query heads per key-value head, D head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from quasar_core.kernels.triton.activation import silu_multiply
from quasar_core.kernels.triton.attention import attend, attention_workspace
from quasar_core.kernels.triton.norms import rms_norm_residual
from quasar_core.kernels.triton.products import multiply_dense
from quasar_core.kernels.triton.rope import rotate_and_store

WIDEST = 16  # tokens of one launch of these kernels; a longer pass takes several


@dataclass(frozen=True)
class TritonSight:
    """Where the pass stands: the position of each launch's first token, on the device, and a bound on the length."""

    positions: tuple[torch.Tensor, ...]
    length: int
    window: int | None


class TritonSteps:
    """Implements `pass_steps.Steps` in 16 bits."""

    name = "Triton"

    def normed(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """One launch, however many tokens."""
        out = torch.empty_like(hidden)
        rms_norm_residual(hidden, delta, weight, eps, out)
        return out

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        head_norms: torch.Tensor | None,
        tables: tuple[torch.Tensor, torch.Tensor] | None,
        position: torch.Tensor,
        states: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        """One launch, however many tokens."""
        keys, values = states.unbind()
        size = keys.shape[-1]
        queries = qkv.new_empty(qkv.shape[0], qkv.shape[1] // size - 2 * keys.shape[0], size)
        cos, sin = tables or (None, None)
        rotate_and_store(qkv, head_norms, cos, sin, position, keys, values, queries, eps)
        return queries

    def sight(self, position: torch.Tensor, length: int, count: int, window: int | None, group: int) -> Any:
        """A position for every sixteen tokens."""
        positions = (position + begin if begin else position for begin in range(0, count, WIDEST))
        return TritonSight(tuple(positions), length, window)

    def attend(self, queries: torch.Tensor, states: torch.Tensor, sight: Any) -> torch.Tensor:
        """Two launches for every sixteen tokens."""
        count, heads, size = queries.shape
        keys, values = states.unbind()
        out = queries.new_empty(count, heads * size)
        for position, rows, part in zip(sight.positions, queries.split(WIDEST), out.split(WIDEST), strict=True):
            workspace = attention_workspace(queries.device, rows.shape[0], heads, size)
            attend(rows, keys, values, position, sight.window, workspace, part, sight.length)
        return out

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        """One launch."""
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        silu_multiply(gate_up, out)
        return out

    def dense_products(self, rows: int) -> dict[str, Any]:
        """cuBLAS, and for few rows Triton's product."""
        return {"cublas": linear, "triton": _multiply_dense} if rows <= WIDEST else {"cublas": linear}


def _multiply_dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    out = x.new_empty(x.shape[0], weight.shape[0])
    multiply_dense(x, weight, out, bias)
    return out
