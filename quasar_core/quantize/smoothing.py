"""SmoothQuant (Xiao et al., 2023, arXiv 2211.10438): move outliers from activations into weights, exactly. Pure.

x · Wᵀ = (x / s) · (W · s)ᵀ for any factors s, one per input. With s_j = max|x_j|^α / max|W_j|^(1−α) (equation 4) a
large α makes activations easy to round and weights hard. The strength α is searched for each input by the error that
rounding leaves in the outputs. Letters: n rows of calibration text, in and out the layers' sizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quasar_core.quantize.eight_bit import Number

STRENGTHS = tuple(step / 10 for step in range(1, 10))
SMALLEST = 1e-5  # of a magnitude; inputs and weights of 0 get it


@dataclass
class InputSample:
    """What is known of an input: the largest magnitude of each channel [in], and some of its rows [n, in]."""

    largest: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True)
class Smoothing:
    """Factors [in], the strength that gave them (none: all are 1), and the squared error of the outputs."""

    factors: torch.Tensor
    strength: float | None
    error: float


def search_smoothing(sample: InputSample, weights: Sequence[torch.Tensor], number: Number) -> Smoothing:
    """The strength with the least error in the outputs of `weights` [out, in], which read the same input."""
    outputs = [sample.rows @ weight.t() for weight in weights]
    none = torch.ones_like(sample.largest)
    best = Smoothing(none, None, _error(sample.rows, weights, outputs, none, number))
    for strength in STRENGTHS:
        factors = smoothing_factors(sample.largest, weights, strength)
        error = _error(sample.rows, weights, outputs, factors, number)
        if error < best.error:
            best = Smoothing(factors, strength, error)
    return best


def smoothing_factors(largest: torch.Tensor, weights: Sequence[torch.Tensor], strength: float) -> torch.Tensor:
    """Factors [in] of one strength; the largest weight of an input is taken over all layers that read it."""
    heaviest = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0).clamp_min(SMALLEST)
    factors = largest.clamp_min(SMALLEST).pow(strength) / heaviest.pow(1 - strength)
    return factors / (factors.amax() * factors.amin()).sqrt()  # around 1, so that what takes them up keeps its size


def fold_into_norm(norm: torch.Tensor, factors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A norm's weight ÷ factors in its own dtype, and the factors that this rounding left in truth."""
    folded = (norm.float() / factors).to(norm.dtype)
    kept = folded != 0
    return folded, torch.where(kept, norm.float() / folded.float().masked_fill(~kept, 1), torch.ones_like(factors))


def _error(
    rows: torch.Tensor,
    weights: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    factors: torch.Tensor,
    number: Number,
) -> float:
    rounded = number.round_rows(rows / factors)
    error = 0.0
    for weight, output in zip(weights, outputs, strict=True):
        error += (
            (rounded @ number.round_weight(weight * factors).dequantize().to(rounded).t() - output)
            .square()
            .sum()
            .item()
        )
    return error
