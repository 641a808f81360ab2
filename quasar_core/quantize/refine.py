"""Lower a solved layer's loss further: scales by least squares, codes by coordinate descent, in turns. Pure.

GPTQ looks at a column once, and at a scale before any code is known. Here both are looked at again: with the codes
fixed the loss tr((Ŵ − W) H (Ŵ − W)ᵀ) is a quadratic in each row's G scales, with the scales fixed the best code of a
column is a rounding (CDQuant, arXiv 2406.17542). Letters: out and in the layer's sizes, G groups.
"""

import torch

from quasar_core.quantize.grid import Grid, stored_scale

BLOCK_COLUMNS = 128


def refine(
    weight: torch.Tensor, codes: torch.Tensor, grid: Grid, groups: torch.Tensor, hessian: torch.Tensor, sweeps: int
) -> tuple[torch.Tensor, Grid]:
    """Codes [out, in] and grid after so many sweeps; a row keeps what it had where a sweep does not lower its loss."""
    loss = losses(weight, codes, grid, groups, hessian)
    for _ in range(sweeps):
        refitted = fit_scales(weight, codes, grid, groups, hessian)
        moved = descend(weight, codes, refitted, groups, hessian)
        new_loss = losses(weight, moved, refitted, groups, hessian)
        better = (new_loss < loss)[:, None]
        codes = torch.where(better, moved, codes)
        grid = Grid(torch.where(better, refitted.scales, grid.scales), grid.zeros, grid.bits)
        loss = torch.minimum(new_loss, loss)
    return codes, grid


def losses(
    weight: torch.Tensor, codes: torch.Tensor, grid: Grid, groups: torch.Tensor, hessian: torch.Tensor
) -> torch.Tensor:
    """½ · e H eᵀ for each row's error e [in]: the mean squared error of each output, [out]."""
    error = weight - grid.scales[:, groups] * (codes - grid.zeros[:, groups])
    return 0.5 * ((error @ hessian) * error).sum(dim=1)


def fit_scales(
    weight: torch.Tensor, codes: torch.Tensor, grid: Grid, groups: torch.Tensor, hessian: torch.Tensor
) -> Grid:
    """The scales [out, G] that these codes want: per row the solution of G normal equations."""
    steps = codes - grid.zeros[:, groups]  # the weight in units of the scale
    count = grid.scales.shape[1]
    members = [groups == g for g in range(count)]
    products = (steps[:, own] @ hessian[own] for own in members)  # each group's part of steps · H
    normal = torch.stack([_sum_groups(product * steps, groups, count) for product in products])
    normal = normal.permute(1, 0, 2)  # [out, G, G]
    wanted = _sum_groups((weight @ hessian) * steps, groups, count)
    # A group whose codes are all zero has no wish: a little weight on the old scales keeps the equations solvable.
    ridge = 1e-4 * normal.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True).clamp_min(1e-20)
    solution = torch.linalg.solve(normal + torch.diag_embed(ridge.expand(-1, count)), wanted + ridge * grid.scales)
    return Grid(stored_scale(solution), grid.zeros, grid.bits)


def _sum_groups(values: torch.Tensor, groups: torch.Tensor, count: int) -> torch.Tensor:
    """Sums [out, G] of values [out, in] over each group's columns."""
    return values.new_zeros(len(values), count).index_add_(1, groups, values)


def descend(
    weight: torch.Tensor, codes: torch.Tensor, grid: Grid, groups: torch.Tensor, hessian: torch.Tensor
) -> torch.Tensor:
    """Move every column in turn to the codes [out] that lower the loss most, the other columns staying."""
    codes, top = codes.clone(), 2**grid.bits - 1
    scales, curvature = grid.scales[:, groups], hessian.diagonal()
    gradient = (scales * (codes - grid.zeros[:, groups]) - weight) @ hessian
    for begin in range(0, codes.shape[1], BLOCK_COLUMNS):
        columns = slice(begin, min(begin + BLOCK_COLUMNS, codes.shape[1]))
        moves = torch.zeros_like(codes[:, columns])
        local, block = gradient[:, columns].clone(), hessian[columns, columns]
        for i, column in enumerate(range(columns.start, columns.stop)):
            if curvature[column] == 0:
                continue
            wish = codes[:, column] - local[:, i] / (curvature[column] * scales[:, column])
            rounded = wish.round().clamp(0, top)
            moves[:, i] = (rounded - codes[:, column]) * scales[:, column]
            codes[:, column] = rounded
            local += moves[:, i, None] * block[i]
        gradient += moves @ hessian[columns]
    return codes
