"""The grid of a group, w ≈ scale · (code − zero), and the lattice that a piece of a layer is rounded to. Pure.

In a piece a column's outputs lie beside one another: its tensors are [in, r], so that a loop over columns reads and
writes memory in order. Letters: out and in the layer's sizes, G groups, g group size, r outputs of a piece, C columns
of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from quasar_core.quantize.solve import cpp

SEARCH_STEPS = 80
SMALLEST_SCALE = 1e-7  # near float16's smallest; a group of zeros gets it
SEARCH_EXPONENT = 2.4


@dataclass(frozen=True)
class Grid:
    """Scales and zeros [out, G], scales already rounded to what the checkpoint stores (float16)."""

    scales: torch.Tensor
    zeros: torch.Tensor
    bits: int

    def nearest_codes(self, weight: torch.Tensor, group: int) -> torch.Tensor:
        """Codes of weights [out] or [out, n] that belong to one group."""
        scale, zero = self.scales[:, group], self.zeros[:, group]
        if weight.dim() == 2:
            scale, zero = scale[:, None], zero[:, None]
        return (torch.round(weight / scale) + zero).clamp(0, 2**self.bits - 1)


def round_to_nearest(weight: torch.Tensor, grid: Grid, groups: torch.Tensor) -> torch.Tensor:
    """Codes [out, in] of the nearest grid points; groups [in] of the columns."""
    scales, zeros = grid.scales[:, groups], grid.zeros[:, groups]
    return (torch.round(weight / scales) + zeros).clamp(0, 2**grid.bits - 1)


def fit_grid(weight: torch.Tensor, bits: int, group_size: int, sym: bool, search: bool = True) -> Grid:
    """Scales and zeros for weight [out, in]; with `search`, shrunk ranges that lower Σ |error|^2.4 are preferred."""
    size = weight.shape[1] if group_size == -1 else group_size
    groups = _in_groups(weight, size)
    if not search:
        scales, zeros = _range_to_grid(*_range(groups), bits, sym)
    elif cpp.runs(groups):
        scales, zeros = cpp.search_grids(groups, bits, sym, SEARCH_STEPS, SMALLEST_SCALE, SEARCH_EXPONENT)
    else:
        scales, zeros = search_grids(groups, bits, sym)
    return Grid(scales.view(len(weight), -1), zeros.view(len(weight), -1), bits)


def _in_groups(weight: torch.Tensor, size: int) -> torch.Tensor:
    """Groups [out · G, size] of a weight [out, in]. A short one is filled up with zeros, which no grid misses."""
    missing = -weight.shape[1] % size
    return torch.nn.functional.pad(weight, (0, missing)).reshape(-1, size)


def search_grids(groups: torch.Tensor, bits: int, sym: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros [n] of groups [n, size]: the best of `SEARCH_STEPS` ranges, from the whole one to a fifth."""
    low, high = _range(groups)
    best_scale, best_zero = _range_to_grid(low, high, bits, sym)
    best_error = _grid_error(groups, best_scale, best_zero, bits)
    for step in range(1, SEARCH_STEPS):
        shrink = 1 - 0.8 * step / SEARCH_STEPS
        scale, zero = _range_to_grid(low * shrink, high * shrink, bits, sym)
        error = _grid_error(groups, scale, zero, bits)
        better = error < best_error
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        best_error = torch.where(better, error, best_error)
    return best_scale, best_zero


def _range(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and the largest weight of each group, and 0."""
    return groups.amin(dim=1).clamp_max(0), groups.amax(dim=1).clamp_min(0)


def _range_to_grid(low: torch.Tensor, high: torch.Tensor, bits: int, sym: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric: |scale| = 2 · absmax ÷ (2^bits − 1), zero in the middle. Asymmetric: the range, zero from 1 up.

    Below a symmetric grid's zero there is one more point than above it: the scale is negative where the weight of the
    largest magnitude is positive, so that this weight has that point. Version 1 of the format stores zero − 1, and
    readers differ on what −1 means: so no zero is 0.
    """
    top = 2**bits - 1
    if sym:
        scale = stored_scale(2 * torch.maximum(low.abs(), high) / top)
        return torch.where(high > -low, -scale, scale), torch.full_like(scale, 2 ** (bits - 1))
    scale = stored_scale((high - low) / top)
    return scale, torch.round(-low / scale).clamp(1, top)


def stored_scale(scale: torch.Tensor) -> torch.Tensor:
    """A scale as the checkpoint holds it: not 0, rounded to float16."""
    return scale.abs().clamp_min(SMALLEST_SCALE).copysign(scale).to(torch.float16).to(scale.dtype)


def _grid_error(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Σ |error|^2.4 of each group: between the squared and the largest error, as the scale search of GPTQ's authors."""
    scale, zero = scale[:, None], zero[:, None]
    steps = torch.div(groups, scale).round_().clamp_(-zero, 2**bits - 1 - zero)
    return steps.mul_(scale).sub_(groups).abs_().pow_(SEARCH_EXPONENT).sum(dim=1)


BLOCK = cpp.MOST_COLUMNS


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
        """The lattice with other scales for its steps."""
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

    def block(self, columns: Sequence[int], backwards: bool = False) -> cpp.Columns:
        """A block of these columns for the loops in C++, in the order of the visit."""
        groups = torch.tensor([column // self.size for column in columns], dtype=torch.int32)
        return cpp.Columns(self.scales, self.low, self.high, groups, backwards)
