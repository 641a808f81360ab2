"""The points that a piece of a layer is rounded to, columns first. Pure.

A weight is scale · step, where step = code − zero is a whole number. In a piece a column's outputs lie beside one
another: its tensors are [in, r], so that a loop over columns reads and writes memory in order. Letters: r outputs of a
piece, in the layer's inputs, G groups, C columns of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from quasar_core.kernels import cpu_solver
from quasar_core.quantize.grid import Grid

BLOCK = cpu_solver.MOST_COLUMNS


@dataclass(frozen=True)
class Lattice:
    """Scales and the smallest and largest steps [G, r]; `size` columns share a group, the last may have fewer."""

    scales: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    size: int

    @classmethod
    def of(cls, grid: Grid, size: int) -> "Lattice":
        """A grid [r, G], columns first."""
        zeros = grid.zeros.t().contiguous()
        return cls(grid.scales.t().contiguous(), -zeros, 2**grid.bits - 1 - zeros, size)

    def with_scales(self, scales: torch.Tensor) -> "Lattice":
        """The same steps, of other lengths."""
        return replace(self, scales=scales)

    def spread(self, values: torch.Tensor, columns: int) -> torch.Tensor:
        """Values [G, r] of the groups for each of the columns [in, r]."""
        return values.repeat_interleave(self.size, dim=0)[:columns]

    def nearest(self, weight: torch.Tensor) -> torch.Tensor:
        """The steps [in, r] nearest to a weight [in, r], ties to even."""
        steps = (weight / self.spread(self.scales, len(weight))).round_()
        return steps.clamp_(min=self.spread(self.low, len(weight))).clamp_(max=self.spread(self.high, len(weight)))

    def values(self, steps: torch.Tensor) -> torch.Tensor:
        """The weights [in, r] that steps [in, r] stand for."""
        return self.spread(self.scales, len(steps)).mul_(steps)

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sums [G, r] of values [n, r] over each group's columns, from a group's first column on."""
        whole = len(values) // self.size * self.size
        sums = values[:whole].unflatten(0, (-1, self.size)).sum(dim=1)
        return sums if whole == len(values) else torch.cat([sums, values[whole:].sum(dim=0, keepdim=True)])

    def block(self, columns: Sequence[int], backwards: bool = False) -> cpu_solver.Columns:
        """A block of these columns for the loops in C++, in the order of the visit."""
        groups = torch.tensor([column // self.size for column in columns], dtype=torch.int32)
        return cpu_solver.Columns(self.scales, self.low, self.high, groups, backwards)
