"""GPTQ's loop (Frantar et al., 2023, arXiv 2210.17323, section 3): columns rounded in turn, errors spread. Pure.

Each column's rounding error is spread over the columns not yet rounded, along the inverse Hessian. Columns are taken
from the last to the first of the factor's order (`factor.py`), in blocks: within a block an error reaches each column
at once, the columns of other blocks by one product. Letters: in, r and C as in `lattice.py`.
"""

import torch

from quasar_core.kernels import cpu_solver
from quasar_core.quantize.factor import InverseFactor
from quasar_core.quantize.lattice import BLOCK, Lattice


def round_columns(weight: torch.Tensor, lattice: Lattice, factor: InverseFactor) -> torch.Tensor:
    """Steps [in, r] for weight [in, r], columns in their own order; the factor has another."""
    order, work = factor.order.tolist(), weight[factor.order]
    steps = torch.empty_like(work)
    for end in range(len(work), 0, -BLOCK):
        begin = max(end - BLOCK, 0)
        errors = _round_block(
            work[begin:end], factor.unit[begin:end, begin:end], lattice, order[begin:end], steps[begin:end]
        )
        work[:begin].addmm_(factor.unit[begin:end, :begin].t(), errors, alpha=-1)
    return torch.empty_like(steps).index_copy_(0, factor.order, steps)


def _round_block(
    block: torch.Tensor, unit: torch.Tensor, lattice: Lattice, columns: list[int], steps: torch.Tensor
) -> torch.Tensor:
    """Fill the steps [C, r] of a block, which is used up; errors [C, r] as they are to be spread by rows of U."""
    errors = torch.empty_like(block)
    if cpu_solver.runs(block):
        kernel = unit.flip(0, 1).t().contiguous()
        lattice.block(columns[::-1], backwards=True).round(block, kernel, steps, errors)
        return errors
    for i in reversed(range(len(block))):
        group = columns[i] // lattice.size
        scale = lattice.scales[group]
        torch.div(block[i], scale, out=steps[i])
        steps[i].round_().clamp_(lattice.low[group], lattice.high[group])
        torch.addcmul(block[i], steps[i], scale, value=-1, out=errors[i])
        block[:i].addr_(unit[i, :i], errors[i], alpha=-1)
    return errors
