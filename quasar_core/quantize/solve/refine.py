"""Lower a solved layer's loss further: scales by least squares, codes by coordinate descent, in turns. Pure.

GPTQ rounds a column once, and fixes a scale before any code is known. Here both are refined: with the steps
fixed the loss ½ · tr(Eᵀ H E) of the error E = Ŵ − W is a quadratic in each output's G scales, with the scales fixed
the best step of a column is a rounding (CDQuant, arXiv 2406.17542). Tensors are columns first. Letters: in, r, G and C
as in `grid.py`.
"""

from dataclasses import dataclass

import torch

from quasar_core.quantize.solve import cpp
from quasar_core.quantize.solve.grid import BLOCK, Lattice, stored_scale
from quasar_core.quantize.solve.matmul import add_product_, times


@dataclass(frozen=True)
class Rounded:
    """Steps [in, r], the lattice that they are counted on, and the loss [r] of each output."""

    steps: torch.Tensor
    lattice: Lattice
    loss: torch.Tensor

    def or_better(self, other: "Rounded") -> "Rounded":
        """Take each output of the other where it has the lower loss."""
        better = other.loss < self.loss
        return Rounded(
            torch.where(better, other.steps, self.steps),
            self.lattice.with_scales(torch.where(better, other.lattice.scales, self.lattice.scales)),
            torch.where(better, other.loss, self.loss),
        )


def refine(
    rounded: Rounded, weight: torch.Tensor, hessian: torch.Tensor, hessian_weight: torch.Tensor, sweeps: int
) -> Rounded:
    """Refine in so many sweeps; an output keeps what it had where a sweep does not lower its loss.

    `hessian_weight` is H · W [in, r].
    """
    for _ in range(sweeps):
        fitted = fit_scales(rounded, hessian, hessian_weight)
        gradient, loss = gradient_and_loss(rounded.steps, fitted, weight, hessian)
        steps, gains = descend(rounded.steps, gradient, fitted, hessian)
        rounded = rounded.or_better(Rounded(steps, fitted, loss + gains))
    return rounded


def gradient_and_loss(
    steps: torch.Tensor, lattice: Lattice, weight: torch.Tensor, hessian: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradient H · E [in, r] and the loss [r]: the mean squared error of each output."""
    error = lattice.values(steps).sub_(weight)
    gradient = times(hessian, error)
    return gradient, 0.5 * error.mul_(gradient).sum(dim=0)


def fit_scales(rounded: Rounded, hessian: torch.Tensor, hessian_weight: torch.Tensor) -> Lattice:
    """Fit the scales to the steps by least squares: for each output G normal equations."""
    steps, lattice = rounded.steps, rounded.lattice
    count, outputs = lattice.scales.shape
    normal = steps.new_zeros(count, count, outputs)
    for group in range(count):  # symmetric: the groups from this one on
        begin = group * lattice.size
        own = slice(begin, begin + lattice.size)
        product = add_product_(torch.zeros_like(steps[begin:]), hessian[own, begin:], steps[own])
        sums = lattice.sums(product.mul_(steps[begin:]))
        normal[group, group:], normal[group:, group] = sums, sums
    wanted, scales, diagonal = (
        lattice.sums(hessian_weight * steps),
        lattice.scales,
        normal.diagonal().t(),
    )  # [G, r] each
    # Steps that are all zero determine no scale: a little weight on the old scales keeps the equations solvable.
    ridge = 1e-4 * diagonal.mean(dim=0).clamp_min(1e-20)
    diagonal += ridge
    solution = torch.linalg.solve(normal.permute(2, 0, 1), (wanted + ridge * scales).t())  # [r, G]
    return lattice.with_scales(stored_scale(solution).t().contiguous())


def descend(
    steps: torch.Tensor, gradient: torch.Tensor, lattice: Lattice, hessian: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move every column in turn to the step that lowers the loss most, the other columns staying.

    The new steps [in, r], and by how much each output's loss has changed [r]; the gradient is overwritten.
    """
    steps, gains = steps.clone(), steps.new_zeros(steps.shape[1])
    for begin in range(0, len(steps), BLOCK):
        end = min(begin + BLOCK, len(steps))
        block = hessian[begin:end, begin:end]
        moves = _descend_block(steps[begin:end], gradient[begin:end], lattice, range(begin, end), block, gains)
        add_product_(gradient[end:], hessian[begin:end, end:], moves)
    return steps, gains


def _descend_block(
    steps: torch.Tensor,
    gradient: torch.Tensor,
    lattice: Lattice,
    columns: range,
    hessian: torch.Tensor,
    gains: torch.Tensor,
) -> torch.Tensor:
    """Move the steps [C, r] of a block in place and count the gains [r]; the moves [C, r], as weights."""
    moves, curvature = torch.empty_like(steps), hessian.diagonal()
    curvature = torch.where(curvature == 0, torch.inf, curvature)  # an input that is always 0 keeps its code
    if cpp.runs(steps):
        lattice.block(columns).descend(gradient, hessian.neg().contiguous(), curvature, steps, moves, gains)
        return moves
    before = gradient.clone()
    for i, column in enumerate(columns):
        group = column // lattice.size
        scale, old = lattice.scales[group], steps[i].clone()
        torch.addcdiv(old, gradient[i], curvature[i] * scale, value=-1, out=steps[i])
        steps[i].round_().clamp_(lattice.low[group], lattice.high[group])
        torch.mul(steps[i] - old, scale, out=moves[i])
        gradient[i + 1 :].addr_(hessian[i, i + 1 :], moves[i])
    gains += before.addmm_(hessian, moves, alpha=0.5).mul_(moves).sum(dim=0)
    return moves
