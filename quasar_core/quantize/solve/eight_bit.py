"""8 bits for weights and activations, integers (W8A8) or floating point (fp8 e4m3): formats, smoothing, solver. Pure.

Weights have one scale per output, activations one scale per token, found when the model runs. Scales have bfloat16's
digits, so that a checkpoint of any dtype holds them exactly. SmoothQuant (Xiao et al., 2023, arXiv 2211.10438) moves
outliers from activations into weights, exactly: x · Wᵀ = (x / s) · (W · s)ᵀ, with s_j = max|x_j|^α / max|W_j|^(1−α)
(equation 4), and α searched for each input by the error that rounding leaves in the outputs. SmoothQuant and the
Quasar paper round every weight to the nearest; here the errors of a column are spread over the columns not yet
rounded, as in `gptq.py`. Letters: T rows, n rows of calibration text, out and in a layer's sizes, r outputs of a
piece.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from quasar_core.checkpoint.compressed_tensors import FLOAT8, LARGEST, Float8Weight, PackedWeight
from quasar_core.checkpoint.gptq_format import QuantizedWeight, trivial_groups
from quasar_core.errors import QuasarError
from quasar_core.kernels.eight_bit import LARGEST_INT8, quantize_rows_float8, quantize_rows_int8
from quasar_core.quantize.solve.factor import InverseFactor, inverse_factor
from quasar_core.quantize.solve.gptq import Solution, SolverConfig, column_order, pieces, target_weight
from quasar_core.quantize.solve.grid import BLOCK

SMALLEST_SCALE = 2.0**-17  # float16 holds bfloat16's digits down to here
_MIDDLE = 128  # the code of 0


class EightBitFormat(ABC):
    """A format of numbers in 8 bits. A weight is such a number times the scale of its output."""

    largest: float
    dtype: torch.dtype  # that holds every number of the format

    @abstractmethod
    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """Round to the nearest numbers of the format, in the dtype of the values."""

    @abstractmethod
    def pack(self, values: torch.Tensor, scales: torch.Tensor) -> PackedWeight:
        """Pack numbers of the format [out, in] and scales [out] as a layer, on the CPU."""

    @abstractmethod
    def round_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize activations [T, in] per row and dequantize them, float32 [T, in]."""

    def round_weight(self, weight: torch.Tensor) -> PackedWeight:
        """Round every weight [out, in] to nearest."""
        scales = channel_scales(weight, self.largest)
        return self.pack(self.nearest(weight.float() / scales[:, None]), scales)


class Int8Format(EightBitFormat):
    """Integers from −127 to 127."""

    largest = float(LARGEST_INT8)
    dtype = torch.int8

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """Round to integers, ties to even."""
        return values.round().clamp_(-self.largest, self.largest)

    def pack(self, values: torch.Tensor, scales: torch.Tensor) -> QuantizedWeight:
        """Store codes around 128."""
        return QuantizedWeight(
            bits=8,
            group_size=-1,
            codes=(values.to("cpu", torch.int16) + _MIDDLE).t().to(torch.uint8).contiguous(),
            scales=scales[None].to("cpu", torch.float16),
            zeros=torch.full((1, len(values)), _MIDDLE, dtype=torch.int32),
            g_idx=trivial_groups(values.shape[1], -1),
        )

    def round_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize and dequantize."""
        values, scales = quantize_rows_int8(x)
        return values.float() * scales


class E4M3Format(EightBitFormat):
    """Floating point e4m3: up to 448, 3 bits of mantissa."""

    largest = LARGEST
    dtype = FLOAT8

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """Round as the dtype does."""
        return values.clamp(-LARGEST, LARGEST).to(FLOAT8).to(values.dtype)

    def pack(self, values: torch.Tensor, scales: torch.Tensor) -> Float8Weight:
        """Store values and scales as they are."""
        return Float8Weight(values.to("cpu", FLOAT8), scales.cpu())

    def round_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize and dequantize."""
        values, scales = quantize_rows_float8(x)
        return values.float() * scales


def channel_scales(weight: torch.Tensor, largest: float) -> torch.Tensor:
    """Compute scales [out] in float32 with bfloat16's digits: an output's largest magnitude ÷ the largest number."""
    scales = weight.float().abs().amax(dim=1) / largest
    return scales.clamp_min(SMALLEST_SCALE).to(torch.bfloat16).float()


STRENGTHS = tuple(step / 10 for step in range(1, 10))
SMALLEST = 1e-5  # of a magnitude; inputs and weights of 0 get it


@dataclass
class InputSample:
    """A layer's activations: the largest magnitude of each channel [in], and some rows [n, in]."""

    largest: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True)
class Smoothing:
    """Factors [in], the strength that gave them (none: all are 1), and the squared error of the outputs."""

    factors: torch.Tensor
    strength: float | None
    error: float


def search_smoothing(sample: InputSample, weights: Sequence[torch.Tensor], number_format: EightBitFormat) -> Smoothing:
    """Find the strength with the least error in the outputs of `weights` [out, in], which read the same input."""
    outputs = [sample.rows @ weight.t() for weight in weights]
    none = torch.ones_like(sample.largest)
    best = Smoothing(none, None, _error(sample.rows, weights, outputs, none, number_format))
    for strength in STRENGTHS:
        factors = smoothing_factors(sample.largest, weights, strength)
        error = _error(sample.rows, weights, outputs, factors, number_format)
        if error < best.error:
            best = Smoothing(factors, strength, error)
    return best


def smoothing_factors(largest: torch.Tensor, weights: Sequence[torch.Tensor], strength: float) -> torch.Tensor:
    """Compute the factors [in] of one strength; an input's largest weight is taken over all layers that read it."""
    heaviest = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0).clamp_min(SMALLEST)
    factors = largest.clamp_min(SMALLEST).pow(strength) / heaviest.pow(1 - strength)
    return factors / (factors.amax() * factors.amin()).sqrt()  # around 1: norms keep their size


def fold_into_norm(norm: torch.Tensor, factors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide a norm's weight by the factors, in its own dtype; return it and the factors that this rounding left."""
    folded = (norm.float() / factors).to(norm.dtype)
    kept = folded != 0
    return folded, torch.where(kept, norm.float() / folded.float().masked_fill(~kept, 1), torch.ones_like(factors))


def _error(
    rows: torch.Tensor,
    weights: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    factors: torch.Tensor,
    number_format: EightBitFormat,
) -> float:
    rounded = number_format.round_rows(rows / factors)
    error = 0.0
    for weight, output in zip(weights, outputs, strict=True):
        error += (
            (rounded @ number_format.round_weight(weight * factors).dequantize().to(rounded).t() - output)
            .square()
            .sum()
            .item()
        )
    return error


def solve_eight_bits(
    number_format: EightBitFormat,
    weights: Mapping[str, torch.Tensor],
    hessian: torch.Tensor,
    configs: Mapping[str, SolverConfig],
    correlations: MutableMapping[str, torch.Tensor] | None = None,
) -> dict[str, Solution]:
    """Quantize layers [out, in] of one H [in, in], as `gptq.solve_group`.

    On the same grid never worse than rounding to nearest; inputs that are always 0 take no part in the grid.
    """
    first, hessian = next(iter(weights)), hessian.float()
    config = configs[first]
    factor = inverse_factor(hessian, column_order(hessian, config.act_order), config.damp, first)

    def solve(name: str, correlation: torch.Tensor | None, rows: slice) -> Piece:
        target = target_weight(weights[name][rows], hessian, factor, None if correlation is None else correlation[rows])
        scales = channel_scales(target.t(), number_format.largest)
        return Piece(target, scales, _better(number_format, target, scales, hessian, factor))

    solutions = {}
    for name, weight in weights.items():
        correlation = (correlations or {}).pop(name, None)
        solutions[name] = _by_pieces(number_format, weight, hessian, name, partial(solve, name, correlation))
    return solutions


def round_to_nearest(
    number_format: EightBitFormat, weights: Mapping[str, torch.Tensor], hessian: torch.Tensor
) -> dict[str, Solution]:
    """Round weights [out, in] to nearest, as SmoothQuant and the Quasar paper do; H gives the loss."""

    def solve(name: str, rows: slice) -> Piece:
        target = weights[name][rows].t().float()
        scales = channel_scales(target.t(), number_format.largest)
        return Piece(target, scales, number_format.nearest(target / scales))

    return {
        name: _by_pieces(number_format, weight, hessian.float(), name, partial(solve, name))
        for name, weight in weights.items()
    }


@dataclass(frozen=True)
class Piece:
    """Some outputs of a layer: target weights [in, r], scales [r] and values [in, r]."""

    target: torch.Tensor
    scales: torch.Tensor
    values: torch.Tensor


def _by_pieces(
    number_format: EightBitFormat,
    weight: torch.Tensor,
    hessian: torch.Tensor,
    name: str,
    solve: Callable[[slice], Piece],
) -> Solution:
    """Quantize a layer piece by piece; QuasarError where its loss is not finite."""
    out_features, in_features = weight.shape
    values = torch.empty(weight.shape, dtype=number_format.dtype, device=weight.device)
    scales = torch.empty(out_features, device=weight.device)
    loss = output = 0.0
    for rows in pieces(out_features, in_features, weight.device.type != "cpu"):
        piece = solve(rows)
        values[rows], scales[rows] = piece.values.t().to(number_format.dtype), piece.scales
        loss += _losses(piece.target - piece.values * piece.scales, hessian).sum().item()
        output += _losses(piece.target, hessian).sum().item()
    if not math.isfinite(loss):
        raise QuasarError(f"{name} could not be quantized: its weights or its inputs are not finite.")
    return Solution(number_format.pack(values, scales), loss, loss / output if output > 0 else 0.0)


def _better(
    number_format: EightBitFormat,
    target: torch.Tensor,
    scales: torch.Tensor,
    hessian: torch.Tensor,
    factor: InverseFactor,
) -> torch.Tensor:
    """Take for each output [in, r] the lower loss: GPTQ's rounding, or rounding to nearest."""
    nearest, spread = number_format.nearest(target / scales), round_columns(number_format, target, scales, factor)
    of_nearest, of_spread = (_losses(target - values * scales, hessian) for values in (nearest, spread))
    return torch.where(of_spread <= of_nearest, spread, nearest)


def _losses(error: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Compute ½ · eᵀ H e for each output's error e [in] in [in, r]."""
    return 0.5 * ((hessian @ error) * error).sum(dim=0)


def round_columns(
    number_format: EightBitFormat, target: torch.Tensor, scales: torch.Tensor, factor: InverseFactor
) -> torch.Tensor:
    """Round a target [in, r] by scales [r] to values [in, r], from the last of the factor's order to the first."""
    work = target[factor.order]
    values = torch.empty_like(work)
    for end in range(len(work), 0, -BLOCK):
        begin = max(end - BLOCK, 0)
        block, unit, errors = work[begin:end], factor.unit[begin:end, begin:end], torch.empty_like(work[begin:end])
        for i in reversed(range(end - begin)):
            values[begin + i] = number_format.nearest(block[i] / scales)
            torch.addcmul(block[i], values[begin + i], scales, value=-1, out=errors[i])
            block[:i].addr_(unit[i, :i], errors[i], alpha=-1)
        work[:begin].addmm_(factor.unit[begin:end, :begin].t(), errors, alpha=-1)
    return torch.empty_like(values).index_copy_(0, factor.order, values)
