"""What a block does to its queries and keys before attention: norms of heads or of rows, and the rotation.

Letters: T tokens of a pass, H key-value heads, G query heads per key-value head, D head size.
"""

from dataclasses import dataclass

import torch

from quasar_core.kernels.cpu.rms_norm import rms_norm
from quasar_core.models.architectures.row import HeadNorms
from quasar_core.models.rope import RopeConfig, swapped

Tables = tuple[torch.Tensor, torch.Tensor]  # cosines and sines


@dataclass(frozen=True)
class Turn:
    """The norms and the rotation of one block's queries and keys."""

    queries: int  # H·G
    norms: HeadNorms | None
    weight: torch.Tensor | None  # of the norms [H·G + H, D]
    rope: RopeConfig | None
    eps: float
    shares: bool = False  # keys and values are an earlier block's, and there are queries alone

    @property
    def of_rows(self) -> bool:
        """Whether all queries are normed as one row, and all keys."""
        return self.norms is not None and self.norms.whole_rows

    @property
    def norms_last(self) -> bool:
        """Whether norms come after the rotation."""
        return self.norms is not None and self.norms.after_rotation

    def __call__(self, heads: torch.Tensor, tables: Tables | None) -> torch.Tensor:
        """Queries and keys [T, H·G + H, D], normed and rotated; cosines and sines are [T, 1, D]."""
        x = heads if self.norms_last else self.normed(heads)
        if self.rope is not None and tables is not None:
            x = torch.addcmul(x * tables[0], swapped(x, self.rope), tables[1])
        return self.normed(x) if self.norms_last else x

    def values(self, values: torch.Tensor) -> torch.Tensor:
        """Values [T, H, D], normed where the block norms them."""
        if self.norms is None or not self.norms.of_values:
            return values
        return rms_norm(values, None, self.eps)

    def normed(self, heads: torch.Tensor) -> torch.Tensor:
        """The norms alone, where there are such."""
        if self.weight is None:
            return heads
        if self.of_rows:
            sizes = [self.queries, heads.shape[1] - self.queries]
            parts = zip(heads.split(sizes, 1), self.weight.split(sizes), strict=True)
            rows = [normed(part.flatten(1), weight.flatten(), self.eps).view_as(part) for part, weight in parts]
            return torch.cat(rows, 1)
        x = rms_norm(heads.to(self.weight.dtype), None, self.eps) * self.weight
        return x.to(heads.dtype)


def split_heads(projected: torch.Tensor, size: int, gated: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Queries, keys and values [T, heads, D] of a product's rows, and the gates [T, gated·D] behind `gated` queries."""
    if not gated:
        return projected.view(len(projected), -1, size), None
    pairs, rest = projected.split([2 * gated * size, projected.shape[-1] - 2 * gated * size], -1)
    queries, gates = pairs.view(-1, gated, 2 * size).split(size, -1)
    return torch.cat((queries, rest.view(len(rest), -1, size)), 1), gates.flatten(1)


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of x [..., D], rounded once, at the end."""
    return rms_norm(x, weight, eps)
