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
from quasar_core.quantize.solve.gptq import Solution, SolverConfig, aim_of, column_order, pieces
from quasar_core.quantize.solve.grid import BLOCK

SMALLEST_SCALE = 2.0**-17  # float16 holds bfloat16's digits down to here
_MIDDLE = 128  # the code of 0


class Number(ABC):
    """A way to write numbers in 8 bits. A weight is what it can write, times the scale of its output."""

    largest: float
    dtype: torch.dtype  # that holds all it can write

    @abstractmethod
    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """The nearest of what it can write, in the dtype of the values."""

    @abstractmethod
    def pack(self, values: torch.Tensor, scales: torch.Tensor) -> PackedWeight:
        """A layer of values [out, in] that it can write and scales [out], on the CPU."""

    @abstractmethod
    def round_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Activations [T, in] → what is left of them, float32 [T, in]."""

    def round_weight(self, weight: torch.Tensor) -> PackedWeight:
        """Every weight [out, in] to the nearest, on its own."""
        scales = channel_scales(weight, self.largest)
        return self.pack(self.nearest(weight.float() / scales[:, None]), scales)


class Integers(Number):
    """From −127 to 127."""

    largest = float(LARGEST_INT8)
    dtype = torch.int8

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """Whole numbers, ties to even."""
        return values.round().clamp_(-self.largest, self.largest)

    def pack(self, values: torch.Tensor, scales: torch.Tensor) -> QuantizedWeight:
        """Codes around 128."""
        return QuantizedWeight(
            bits=8,
            group_size=-1,
            codes=(values.to("cpu", torch.int16) + _MIDDLE).t().to(torch.uint8).contiguous(),
            scales=scales[None].to("cpu", torch.float16),
            zeros=torch.full((1, len(values)), _MIDDLE, dtype=torch.int32),
            g_idx=trivial_groups(values.shape[1], -1),
        )

    def round_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Rounded, and back."""
        values, steps = quantize_rows_int8(x)
        return values.float() * steps


class Floats(Number):
    """e4m3: up to 448, 3 bits of mantissa."""

    largest = LARGEST
    dtype = FLOAT8

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """As the dtype rounds."""
        return values.clamp(-LARGEST, LARGEST).to(FLOAT8).to(values.dtype)

    def pack(self, values: torch.Tensor, scales: torch.Tensor) -> Float8Weight:
        """Values and scales as they are."""
        return Float8Weight(values.to("cpu", FLOAT8), scales.cpu())

    def round_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Rounded, and back."""
        values, steps = quantize_rows_float8(x)
        return values.float() * steps


def channel_scales(weight: torch.Tensor, largest: float) -> torch.Tensor:
    """Scales [out] in float32 with bfloat16's digits: the largest magnitude of an output ÷ the largest number."""
    scales = weight.float().abs().amax(dim=1) / largest
    return scales.clamp_min(SMALLEST_SCALE).to(torch.bfloat16).float()


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


def solve_eight_bits(
    number: Number,
    weights: Mapping[str, torch.Tensor],
    hessian: torch.Tensor,
    configs: Mapping[str, SolverConfig],
    lacking: MutableMapping[str, torch.Tensor] | None = None,
) -> dict[str, Solution]:
    """Layers [out, in] of one H [in, in], as `gptq.solve_group`; no output is worse than rounded to nearest."""
    first, hessian = next(iter(weights)), hessian.float()
    config = configs[first]
    factor = inverse_factor(hessian, column_order(hessian, config.act_order), config.damp, first)

    def solve(name: str, lacks: torch.Tensor | None, rows: slice) -> Piece:
        aim = aim_of(weights[name][rows], hessian, factor, None if lacks is None else lacks[rows])
        scales = channel_scales(aim.t(), number.largest)
        return Piece(aim, scales, _better(number, aim, scales, hessian, factor))

    solutions = {}
    for name, weight in weights.items():
        lacks = (lacking or {}).pop(name, None)
        solutions[name] = _by_pieces(number, weight, hessian, name, partial(solve, name, lacks))
    return solutions


def round_to_nearest(number: Number, weights: Mapping[str, torch.Tensor], hessian: torch.Tensor) -> dict[str, Solution]:
    """Layers [out, in], every weight to the nearest: SmoothQuant's and the Quasar paper's way; H gives the loss."""

    def solve(name: str, rows: slice) -> Piece:
        aim = weights[name][rows].t().float()
        scales = channel_scales(aim.t(), number.largest)
        return Piece(aim, scales, number.nearest(aim / scales))

    return {
        name: _by_pieces(number, weight, hessian.float(), name, partial(solve, name))
        for name, weight in weights.items()
    }


@dataclass(frozen=True)
class Piece:
    """Some outputs of a layer: what their weights are to stand for [in, r], scales [r] and values [in, r]."""

    aim: torch.Tensor
    scales: torch.Tensor
    values: torch.Tensor


def _by_pieces(
    number: Number, weight: torch.Tensor, hessian: torch.Tensor, name: str, solve: Callable[[slice], Piece]
) -> Solution:
    """A layer put together, and its loss; QuasarError where that is not finite."""
    out_features, in_features = weight.shape
    values = torch.empty(weight.shape, dtype=number.dtype, device=weight.device)
    scales = torch.empty(out_features, device=weight.device)
    loss = output = 0.0
    for rows in pieces(out_features, in_features, weight.device.type != "cpu"):
        piece = solve(rows)
        values[rows], scales[rows] = piece.values.t().to(number.dtype), piece.scales
        loss += _losses(piece.aim - piece.values * piece.scales, hessian).sum().item()
        output += _losses(piece.aim, hessian).sum().item()
    if not math.isfinite(loss):
        raise QuasarError(f"{name} could not be quantized: its weights or its inputs are not finite.")
    return Solution(number.pack(values, scales), loss, loss / output if output > 0 else 0.0)


def _better(
    number: Number, aim: torch.Tensor, scales: torch.Tensor, hessian: torch.Tensor, factor: InverseFactor
) -> torch.Tensor:
    """Values [in, r] of each output: errors spread, or rounded to nearest where that has the lower loss."""
    nearest, spread = number.nearest(aim / scales), round_columns(number, aim, scales, factor)
    of_nearest, of_spread = (_losses(aim - values * scales, hessian) for values in (nearest, spread))
    return torch.where(of_spread <= of_nearest, spread, nearest)


def _losses(error: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """½ · eᵀ H e for each output's error e [in] in [in, r]."""
    return 0.5 * ((hessian @ error) * error).sum(dim=0)


def round_columns(number: Number, aim: torch.Tensor, scales: torch.Tensor, factor: InverseFactor) -> torch.Tensor:
    """Values [in, r] for an aim [in, r] and scales [r]: columns from the last of the factor's order to the first."""
    work = aim[factor.order]
    values = torch.empty_like(work)
    for end in range(len(work), 0, -BLOCK):
        begin = max(end - BLOCK, 0)
        block, unit, errors = work[begin:end], factor.unit[begin:end, begin:end], torch.empty_like(work[begin:end])
        for i in reversed(range(end - begin)):
            values[begin + i] = number.nearest(block[i] / scales)
            torch.addcmul(block[i], values[begin + i], scales, value=-1, out=errors[i])
            block[:i].addr_(unit[i, :i], errors[i], alpha=-1)
        work[:begin].addmm_(factor.unit[begin:end, :begin].t(), errors, alpha=-1)
    return torch.empty_like(values).index_copy_(0, factor.order, values)
