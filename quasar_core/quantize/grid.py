"""The grid of a group: its scale and zero, so that w ≈ scale · (code − zero). Pure.

Letters: out and in the layer's sizes, G groups, g group size.
"""

from dataclasses import dataclass

import torch

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

    def values(self, codes: torch.Tensor, group: int) -> torch.Tensor:
        """The weights that codes [out] or [out, n] of one group stand for."""
        scale, zero = self.scales[:, group], self.zeros[:, group]
        if codes.dim() == 2:
            scale, zero = scale[:, None], zero[:, None]
        return scale * (codes - zero)


def fit_grid(weight: torch.Tensor, bits: int, group_size: int, sym: bool, search: bool = True) -> Grid:
    """Scales and zeros for weight [out, in]; with `search`, shrunk ranges that lower Σ |error|^2.4 are preferred."""
    size = weight.shape[1] if group_size == -1 else group_size
    columns = [_fit_group(group, bits, sym, search) for group in weight.split(size, dim=1)]
    scales = torch.stack([scale for scale, _ in columns], dim=1)
    zeros = torch.stack([zero for _, zero in columns], dim=1)
    return Grid(scales, zeros, bits)


def _fit_group(weight: torch.Tensor, bits: int, sym: bool, search: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero [out] of one group [out, g]."""
    low, high = weight.amin(dim=1).clamp_max(0), weight.amax(dim=1).clamp_min(0)
    best_scale, best_zero = _range_to_grid(low, high, bits, sym)
    if not search:
        return best_scale, best_zero
    best_error = _grid_error(weight, best_scale, best_zero, bits)
    for step in range(1, SEARCH_STEPS):
        shrink = 1 - 0.8 * step / SEARCH_STEPS
        scale, zero = _range_to_grid(low * shrink, high * shrink, bits, sym)
        error = _grid_error(weight, scale, zero, bits)
        better = error < best_error
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        best_error = torch.where(better, error, best_error)
    return best_scale, best_zero


def _range_to_grid(low: torch.Tensor, high: torch.Tensor, bits: int, sym: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric: scale = 2 · absmax ÷ (2^bits − 1), zero in the middle. Asymmetric: the range, zero from 1 up.

    Version 1 of the format stores zero − 1, and readers differ on what −1 means: so no zero is 0.
    """
    top = 2**bits - 1
    if sym:
        scale = stored_scale(2 * torch.maximum(-low, high) / top)
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    scale = stored_scale((high - low) / top)
    return scale, torch.round(-low / scale).clamp(1, top)


def stored_scale(scale: torch.Tensor) -> torch.Tensor:
    """A scale as the checkpoint holds it: positive, rounded to float16."""
    return scale.clamp_min(SMALLEST_SCALE).to(torch.float16).to(scale.dtype)


def _grid_error(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Σ |error|^2.4 of each row: between the squared and the largest error, as the scale search of GPTQ's authors."""
    codes = (torch.round(weight / scale[:, None]) + zero[:, None]).clamp(0, 2**bits - 1)
    return (scale[:, None] * (codes - zero[:, None]) - weight).abs().pow(SEARCH_EXPONENT).sum(dim=1)
