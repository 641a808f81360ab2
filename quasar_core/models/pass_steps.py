"""The steps of a short pass whose position is read from the device, so that one recording of them serves any position.

Two makers of the same steps: PyTorch's operations, which run anywhere, and Triton's kernels (`triton_steps.py`), a
handful of launches per layer. Every step allocates its result and never waits for the device. Letters: T tokens of a
pass, H key-value heads, G query heads per key-value head, D head size, C capacity of the cache, I size of the MLP.
"""

from typing import Any, Protocol

import torch
from torch.nn.functional import linear, rms_norm, silu

from quasar_core.models.attention import FOLDED_TOKENS, Sight, attend


class Steps(Protocol):
    """What a pass is made of, beside the products that have kernels of their own."""

    name: str

    def normed(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Add `delta` to `hidden` [T, in] in place, then its RMS norm times `weight` → [T, in]."""
        ...

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        head_norms: torch.Tensor | None,
        tables: tuple[torch.Tensor, torch.Tensor] | None,
        position: torch.Tensor,
        states: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        """Norm and rotate queries and keys of qkv [T, (H·G + 2·H)·D], write keys and values into states [2, H, C, D]
        at `position` [1] and behind it → queries [T, H·G, D]. `tables` are cosines and sines [positions, D].
        """
        ...

    def sight(self, position: torch.Tensor, length: int, count: int, window: int | None, group: int) -> Any:
        """What `count` tokens at `position` see of the first `length` positions; made once for a pass."""
        ...

    def attend(self, queries: torch.Tensor, states: torch.Tensor, sight: Any) -> torch.Tensor:
        """Queries [T, H·G, D] over states [2, H, C, D] → [T, H·G·D]."""
        ...

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) · up of gate_up [T, 2·I] → [T, I]."""
        ...

    def dense_products(self, rows: int) -> dict[str, Any]:
        """Ways to multiply x [rows, in] by a weight [out, in] (and add a bias [out]) in 16 or 32 bits, by name."""
        ...


class TorchSteps:
    """PyTorch's operations. Attention reads all of `length`, masked beyond the position."""

    name = "PyTorch's operations"

    def normed(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """See `Steps`."""
        if delta is not None:
            hidden += delta
        return rms_norm(hidden, weight.shape, weight, eps)

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        head_norms: torch.Tensor | None,
        tables: tuple[torch.Tensor, torch.Tensor] | None,
        position: torch.Tensor,
        states: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        """See `Steps`."""
        kv_heads, size = states.shape[1], states.shape[-1]
        heads = qkv.view(qkv.shape[0], -1, size)  # [T, H·G + 2·H, D]
        rotated = x = heads[:, :-kv_heads]
        places = position + torch.arange(qkv.shape[0], device=qkv.device)
        if head_norms is not None:
            rotated = x = rms_norm(x, (size,), None, eps) * head_norms
        if tables is not None:
            cos, sin = (table.index_select(0, places)[:, None] for table in tables)
            rotated = torch.addcmul(x * cos, x.roll(size // 2, -1), sin)
        written = torch.stack((rotated[:, -kv_heads:], heads[:, -kv_heads:]))  # [2, T, H, D]
        states.index_copy_(2, places, written.transpose(1, 2))
        return rotated[:, :-kv_heads]

    def sight(self, position: torch.Tensor, length: int, count: int, window: int | None, group: int) -> Any:
        """A mask over the whole length."""
        own = (position + torch.arange(count, device=position.device))[:, None]
        seen = torch.arange(length, device=position.device)
        visible = seen <= own
        if window is not None:
            visible &= seen > own - window
        mask = visible.repeat_interleave(group, 0) if count <= FOLDED_TOKENS else visible
        return Sight(0, length, causal=False, mask=mask)

    def attend(self, queries: torch.Tensor, states: torch.Tensor, sight: Any) -> torch.Tensor:
        """See `Steps`."""
        return attend(queries, states, sight)

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `Steps`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate) * up

    def dense_products(self, rows: int) -> dict[str, Any]:
        """PyTorch's own: cuBLAS on CUDA."""
        return {"torch": linear}
