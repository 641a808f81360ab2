"""GPTQ (Frantar et al., 2023, arXiv 2210.17323): codes that keep a layer's outputs, not its weights. Pure.

Columns are rounded one by one; each rounding error is spread over the columns not yet rounded, along the inverse
Hessian. What is rounded need not be the layer's own weight: where its inputs differ from the full-precision model's,
a corrected weight gives the full-precision outputs on them (`asymmetric.py`), and is rounded instead. The codes and
scales so found are then refined (`refine.py`). Letters: out and in the layer's sizes, G groups.
"""

import math
from dataclasses import dataclass

import torch

from quasar_core.checkpoint.packing import QuantizedWeight, trivial_groups
from quasar_core.errors import QuasarError
from quasar_core.quantize.grid import Grid, fit_grid
from quasar_core.quantize.refine import losses, refine

BLOCK_COLUMNS = 128
INVERSE_COLUMNS = 512
DAMP_RETRIES = 5


@dataclass(frozen=True)
class SolverConfig:
    """What the solver depends on."""

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    act_order: bool = True
    damp: float = 0.05
    scale_search: bool = True
    sweeps: int = 2


@dataclass(frozen=True)
class Solution:
    """A layer's codes, and its loss: the mean squared output error, summed over outputs; `relative` to the output.

    With a corrected weight the error is the distance from its outputs.
    """

    weight: QuantizedWeight
    loss: float
    relative_loss: float


def solve(weight: torch.Tensor, hessian: torch.Tensor, config: SolverConfig, name: str = "the layer") -> Solution:
    """Quantize weight [out, in] under H [in, in]; never worse than rounding to nearest on the same grid.

    A row (an output) is independent of the others; where rounding to nearest has the lower loss, it is taken.
    """
    weight, hessian = weight.float().clone(), hessian.float()
    dead = hessian.diagonal() == 0
    weight[:, dead] = 0  # an input that is always 0 may have any weight
    grid = fit_grid(weight, config.bits, config.group_size, config.sym, config.scale_search)
    groups = trivial_groups(weight.shape[1], config.group_size).to(weight.device).long()
    nearest = round_to_nearest(weight, grid, groups)
    order = torch.argsort(hessian.diagonal(), descending=True) if config.act_order else None
    solved = solve_codes(weight, hessian, grid, groups, order, config.damp, name)
    better = losses(weight, solved, grid, groups, hessian) <= losses(weight, nearest, grid, groups, hessian)
    codes = torch.where(better[:, None], solved, nearest)
    codes, grid = refine(weight, codes, grid, groups, hessian, config.sweeps)
    loss = losses(weight, codes, grid, groups, hessian).sum().item()
    output = 0.5 * ((weight @ hessian) * weight).sum().item()
    if not math.isfinite(loss):
        raise QuasarError(f"{name} could not be quantized: its weights or its inputs are not finite.")
    return Solution(_store(codes, grid, config), loss, loss / output if output > 0 else 0.0)


def round_to_nearest(weight: torch.Tensor, grid: Grid, groups: torch.Tensor) -> torch.Tensor:
    """Codes [out, in] of the nearest grid points."""
    scales, zeros = grid.scales[:, groups], grid.zeros[:, groups]
    return (torch.round(weight / scales) + zeros).clamp(0, 2**grid.bits - 1)


def solve_codes(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    groups: torch.Tensor,
    order: torch.Tensor | None,
    damp: float,
    name: str,
) -> torch.Tensor:
    """Codes [out, in] by GPTQ, columns in the given order (none: as they stand), blocks of columns at a time."""
    if order is None:
        order = torch.arange(weight.shape[1], device=weight.device)
    work = weight[:, order].clone()
    column_groups = groups[order].tolist()
    factor = inverse_factor(hessian[order][:, order], damp, name)
    codes = torch.empty_like(work)
    for begin in range(0, work.shape[1], BLOCK_COLUMNS):
        end = min(begin + BLOCK_COLUMNS, work.shape[1])
        block, block_factor = work[:, begin:end], factor[begin:end, begin:end]
        errors = torch.empty_like(block)
        for i in range(end - begin):
            column, group = block[:, i], column_groups[begin + i]
            codes[:, begin + i] = grid.nearest_codes(column, group)
            error = (column - grid.values(codes[:, begin + i], group)) / block_factor[i, i]
            block[:, i:] -= error[:, None] * block_factor[i, i:]
            errors[:, i] = error
        work[:, end:] -= errors @ factor[begin:end, end:]
    return codes[:, torch.argsort(order)]


def inverse_factor(hessian: torch.Tensor, damp: float, name: str) -> torch.Tensor:
    """The upper Cholesky factor U of the inverse of the damped Hessian: (H + λI)⁻¹ = Uᵀ U, λ = damp · mean(diag).

    Where the factor does not exist the damping grows tenfold, at most five times.
    """
    dead = hessian.diagonal() == 0
    mean = hessian.diagonal().mean()
    # H = R Rᵀ with R upper is a Cholesky factor of H read backwards, and then U = R⁻¹: one factor, few copies.
    damped = hessian.flip(0, 1)
    del hessian
    damped.diagonal()[dead.flip(0)] = mean if mean > 0 else 1.0
    before = 0.0
    for attempt in range(DAMP_RETRIES):
        damped.diagonal().add_((damp * 10**attempt - before) * mean)
        before = damp * 10**attempt
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed.item():
            continue
        del damped
        upper = inverse_of_lower(lower).flip(0, 1)
        if bool(torch.isfinite(upper).all()):
            return upper
        break
    raise QuasarError(
        f"The Hessian of {name} has no Cholesky factor even with damping {damp * 10 ** (DAMP_RETRIES - 1):g}: "
        "use more calibration text, or a larger --damp."
    )


def inverse_of_lower(lower: torch.Tensor) -> torch.Tensor:
    """L⁻¹ of a lower triangular L, some columns at a time, so that no whole identity is needed beside the two."""
    inverse = torch.zeros_like(lower)
    for begin in range(0, len(lower), INVERSE_COLUMNS):
        rest = lower[begin:, begin:]  # above the diagonal the inverse is zero
        identity = torch.eye(len(rest), min(INVERSE_COLUMNS, len(rest)), dtype=lower.dtype, device=lower.device)
        inverse[begin:, begin : begin + identity.shape[1]] = torch.linalg.solve_triangular(rest, identity, upper=False)
    return inverse


def _store(codes: torch.Tensor, grid: Grid, config: SolverConfig) -> QuantizedWeight:
    return QuantizedWeight(
        config.bits,
        config.group_size,
        codes.t().to("cpu", torch.uint8).contiguous(),
        grid.scales.t().to("cpu", torch.float16).contiguous(),
        grid.zeros.t().to("cpu", torch.int32).contiguous(),
        trivial_groups(codes.shape[1], config.group_size),
    )
