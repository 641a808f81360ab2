"""GPTQ's rounding (arXiv 2210.17323) onto 8-bit numbers with one scale per output: W8A8 and fp8. Pure.

SmoothQuant and the Quasar paper round every weight to the nearest; here the errors of a column are spread over the
columns not yet rounded, as in `gptq.py`, whose factor and aim these are. At 8 bits nothing is gained by searching
scales or by sweeping again. Letters: out and in a layer's sizes, r outputs of a piece.
"""

import math
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial

import torch

from quasar_core.errors import QuasarError
from quasar_core.quantize.eight_bit import Number, channel_scales
from quasar_core.quantize.factor import InverseFactor, inverse_factor
from quasar_core.quantize.gptq import Solution, SolverConfig, aim_of, column_order, pieces
from quasar_core.quantize.lattice import BLOCK


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
