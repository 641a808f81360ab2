"""The triangular factor that GPTQ spreads errors by, made in the place of one matrix. Pure.

With A = H + λI and its Cholesky factor A = L Lᵀ, A⁻¹ = L⁻ᵀ L⁻¹ = Uᵀ D U, where U is L⁻¹ with its rows divided by their
diagonal. The factor of the inverse that GPTQ's paper takes is L⁻¹ read backwards: so whoever takes columns from the
last to the first needs no inverse, no second factor and no second matrix. All is done in blocks of columns, in place:
L overwrites the lower triangle of A, and L⁻¹ overwrites L.
"""

import math
from dataclasses import dataclass

import torch

from quasar_core.errors import QuasarError
from quasar_core.quantize.solve.matmul import add_product_

BLOCK = 256
DAMP_RETRIES = 5


@dataclass(frozen=True)
class InverseFactor:
    """(H + λI)⁻¹ = Uᵀ D U for H [in, in] with rows and columns in `order` [in]: U `unit`, lower triangular, D `pivots`.

    The diagonal of U is 1.
    """

    unit: torch.Tensor
    pivots: torch.Tensor
    order: torch.Tensor

    def apply_(self, x: torch.Tensor) -> torch.Tensor:
        """(H + λI)⁻¹ x for x [in, r], whose rows are in this order; x is overwritten."""
        blocks = range(0, len(x), BLOCK)
        for begin in reversed(blocks):
            rows = slice(begin, begin + BLOCK)
            x[rows] = self.unit[rows, : begin + BLOCK] @ x[: begin + BLOCK]
        x *= self.pivots[:, None]
        for begin in blocks:
            rows = slice(begin, begin + BLOCK)
            x[rows] = add_product_(torch.zeros_like(x[rows]), self.unit[begin:, rows], x[begin:])
        return x


def inverse_factor(hessian: torch.Tensor, order: torch.Tensor, damp: float, name: str) -> InverseFactor:
    """The factor of H [in, in] damped by λ = damp · mean(diag H). An input that is always 0 counts as one of mean size.

    Where there is no factor the damping grows tenfold, at most five times; then QuasarError.
    """
    matrix = torch.zeros_like(hessian)
    for attempt in range(DAMP_RETRIES):
        _fill_damped(matrix, hessian, order, damp * 10**attempt)
        if _factorize(matrix):
            _invert(matrix)
            diagonal = matrix.diagonal().clone()
            matrix /= diagonal[:, None]
            pivots = diagonal.square_()
            if _is_finite(matrix) and _is_finite(pivots):
                return InverseFactor(matrix, pivots, order)
            break
    raise QuasarError(
        f"The Hessian of {name} has no Cholesky factor even with damping {damp * 10 ** (DAMP_RETRIES - 1):g}: "
        "use more calibration text, or a larger --damp."
    )


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are finite; of a matrix no second one is made."""
    return all(map(math.isfinite, torch.stack(torch.aminmax(tensor)).tolist()))


def _fill_damped(factor: torch.Tensor, hessian: torch.Tensor, order: torch.Tensor, damp: float) -> None:
    """The lower triangle of the damped Hessian in this order; above it only the blocks on the diagonal are written."""
    for begin in range(0, len(order), BLOCK):
        end = min(begin + BLOCK, len(order))
        factor[begin:end, :end] = hessian[order[begin:end]][:, order[:end]]
    diagonal, mean = factor.diagonal(), hessian.diagonal().mean()
    diagonal[_is_zero(diagonal)] = torch.where(mean > 0, mean, 1.0)
    diagonal += damp * mean


def _is_zero(tensor: torch.Tensor) -> torch.Tensor:
    """Which numbers are zero by their bits: compared, denormals are zero too where the processor flushes them."""
    return tensor.view(torch.int64 if tensor.dtype == torch.float64 else torch.int32) == 0


def _factorize(matrix: torch.Tensor) -> bool:
    """Overwrite the lower triangle of A by its Cholesky factor L; whether there is one."""
    for begin in range(0, len(matrix), BLOCK):
        panel = matrix[begin:, begin : begin + BLOCK]
        width = panel.shape[1]
        done = matrix[begin:, :begin]
        panel.addmm_(done, done[:width].t(), alpha=-1)
        corner, failed = torch.linalg.cholesky_ex(panel[:width])
        if failed.item():
            return False
        panel[:width] = corner
        panel[width:] = torch.linalg.solve_triangular(corner.t(), panel[width:], upper=True, left=False)
    return True


def _invert(matrix: torch.Tensor) -> None:
    """Overwrite a lower triangular L by M = L⁻¹, from the last block of columns to the first.

    Of L = [[L₁, 0], [K, L₂]] with M₂ = L₂⁻¹ in place already: M = [[M₁, 0], [−M₂ K M₁, M₂]].
    """
    size = len(matrix)
    for begin in reversed(range(0, size, BLOCK)):
        end = min(begin + BLOCK, size)
        corner = matrix[begin:end, begin:end]
        one = torch.eye(end - begin, dtype=matrix.dtype, device=matrix.device)
        corner.copy_(torch.linalg.solve_triangular(corner, one, upper=False))
        for top in reversed(range(end, size, BLOCK)):  # M₂ is triangular: rows above are not needed any more
            rows = slice(top, min(top + BLOCK, size))
            below = matrix[rows, end : rows.stop] @ matrix[end : rows.stop, begin:end]
            torch.mm(below.neg_(), corner, out=matrix[rows, begin:end])
