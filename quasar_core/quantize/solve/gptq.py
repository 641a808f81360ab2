"""GPTQ (Frantar et al., 2023, arXiv 2210.17323): codes that keep a layer's outputs, not its weights. Pure.

Layers that read the same inputs are solved together: they share the Hessian and its one factor (`factor.py`). Each
layer is solved a piece of its outputs at a time, since outputs are independent of one another and the workspace stays
small: correct the weight (`hessian.py`), fit a grid (`grid.py`), round column by column (section 3 of the paper),
refine (`refine.py`). Each column's rounding error is spread over the columns not yet rounded, along the inverse
Hessian. Columns are taken from the last to the first of the factor's order, in blocks: within a block an error reaches
each column at once, the columns of other blocks by one product. Letters: out and in a layer's sizes, G groups, r
outputs of a piece, C columns of a block.
"""

import math
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass

import torch

from quasar_core.checkpoint.compressed_tensors import PackedWeight
from quasar_core.checkpoint.gptq_format import QuantizedWeight, count_groups, trivial_groups
from quasar_core.errors import QuasarError
from quasar_core.quantize.solve import cpp
from quasar_core.quantize.solve.factor import InverseFactor, inverse_factor
from quasar_core.quantize.solve.grid import BLOCK, Lattice, fit_grid
from quasar_core.quantize.solve.matmul import add_product_, times
from quasar_core.quantize.solve.refine import Rounded, gradient_and_loss, refine


def round_columns(weight: torch.Tensor, lattice: Lattice, factor: InverseFactor) -> torch.Tensor:
    """Round weight [in, r] to steps [in, r], columns in their own order; the factor has another."""
    order, work = factor.order.tolist(), weight[factor.order]
    steps = torch.empty_like(work)
    for end in range(len(work), 0, -BLOCK):
        begin = max(end - BLOCK, 0)
        errors = _round_block(
            work[begin:end], factor.unit[begin:end, begin:end], lattice, order[begin:end], steps[begin:end]
        )
        add_product_(work[:begin], factor.unit[begin:end, :begin], errors.neg_())
    return torch.empty_like(steps).index_copy_(0, factor.order, steps)


def _round_block(
    block: torch.Tensor, unit: torch.Tensor, lattice: Lattice, columns: list[int], steps: torch.Tensor
) -> torch.Tensor:
    """Fill the steps [C, r] of a block, which is used up; errors [C, r] as they are to be spread by rows of U."""
    errors = torch.empty_like(block)
    if cpp.runs(block):
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


# Weights of a piece: 4 MB in float32; more on a GPU, whose time goes by the number of pieces.
PIECE_WEIGHTS = 2**20
DEVICE_PIECE_WEIGHTS = 2**27


@dataclass(frozen=True)
class SolverConfig:
    """The options of the solver."""

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

    weight: PackedWeight
    loss: float
    relative_loss: float


def solve(weight: torch.Tensor, hessian: torch.Tensor, config: SolverConfig, name: str = "the layer") -> Solution:
    """Quantize one layer, weight [out, in] under H [in, in]; as `solve_group`."""
    return solve_group({name: weight}, hessian, {name: config})[name]


def solve_group(
    weights: Mapping[str, torch.Tensor],
    hessian: torch.Tensor,
    configs: Mapping[str, SolverConfig],
    correlations: MutableMapping[str, torch.Tensor] | None = None,
) -> dict[str, Solution]:
    """Quantize layers [out, in] of one H [in, in]; never worse than rounding to nearest on the same grid.

    `correlations` [out, in] are those of `hessian.error_correlation`, where inputs have drifted; the mapping is
    emptied. The configs may differ in all but damping and order. An output is independent of the others; where
    rounding to nearest has the lower loss, it is taken.
    """
    (damp, act_order), *others = {(configs[name].damp, configs[name].act_order) for name in weights}
    assert not others, "these layers cannot share a factor"
    hessian, correlations = hessian.float(), {} if correlations is None else correlations
    factor = inverse_factor(hessian, column_order(hessian, act_order), damp, next(iter(weights)))
    return {
        name: solve_layer(weight, hessian, factor, configs[name], correlations.pop(name, None), name)
        for name, weight in weights.items()
    }


def column_order(hessian: torch.Tensor, act_order: bool) -> torch.Tensor:
    """Order the columns [in], the last of which is rounded first: with act-order that of the largest inputs."""
    if act_order:
        return torch.argsort(hessian.diagonal(), descending=True).flip(0)
    return torch.arange(len(hessian) - 1, -1, -1, device=hessian.device)


def solver_rows(in_features: int, on_device: bool) -> int:
    """Return the largest number of outputs of a piece."""
    return max(1, (DEVICE_PIECE_WEIGHTS if on_device else PIECE_WEIGHTS) // in_features)


def solve_layer(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    factor: InverseFactor,
    config: SolverConfig,
    correlation: torch.Tensor | None,
    name: str,
) -> Solution:
    """Quantize one layer with the factor of its Hessian; QuasarError where the loss is not finite."""
    out_features, in_features = weight.shape
    count = count_groups(in_features, config.group_size)
    codes = torch.empty(in_features, out_features, dtype=torch.uint8)
    scales = torch.empty(count, out_features, dtype=torch.float16)
    zeros = torch.empty(count, out_features, dtype=torch.int32)
    loss = output = 0.0
    for rows in pieces(out_features, in_features, weight.device.type != "cpu"):
        target = target_weight(weight[rows], hessian, factor, None if correlation is None else correlation[rows])
        hessian_weight = times(hessian, target)
        solved = _solve_piece(target, hessian, factor, config, hessian_weight)
        lattice = solved.lattice
        codes[:, rows] = (solved.steps - lattice.spread(lattice.low, in_features)).to(torch.uint8)
        scales[:, rows], zeros[:, rows] = lattice.scales, -lattice.low
        loss += solved.loss.sum().item()
        output += 0.5 * (hessian_weight * target).sum().item()
    if not math.isfinite(loss):
        raise QuasarError(f"{name} could not be quantized: its weights or its inputs are not finite.")
    groups = trivial_groups(in_features, config.group_size)
    stored = QuantizedWeight(config.bits, config.group_size, codes, scales, zeros, groups)
    return Solution(stored, loss, loss / output if output > 0 else 0.0)


def pieces(out_features: int, in_features: int, on_device: bool) -> Iterator[slice]:
    """Split the outputs of a layer into nearly equal pieces."""
    count = -(-out_features // solver_rows(in_features, on_device))
    for index in range(count):
        yield slice(out_features * index // count, out_features * (index + 1) // count)


def target_weight(
    weight: torch.Tensor, hessian: torch.Tensor, factor: InverseFactor, correlation: torch.Tensor | None
) -> torch.Tensor:
    """Return W*ᵀ [in, r], the weight that is rounded: the layer's own, corrected where its inputs have drifted."""
    target = weight.t().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if correlation is not None:
        target.index_add_(0, factor.order, factor.apply_(correlation.t()[factor.order]))
    target[hessian.diagonal() == 0] = 0  # an input that is always 0 may have any weight
    return target


def _solve_piece(
    target: torch.Tensor,
    hessian: torch.Tensor,
    factor: InverseFactor,
    config: SolverConfig,
    hessian_weight: torch.Tensor,
) -> Rounded:
    """Find codes and scales for a piece [in, r]."""
    grid = fit_grid(target.t(), config.bits, config.group_size, config.sym, config.scale_search)
    lattice = Lattice.of(grid, len(target) if config.group_size == -1 else config.group_size)
    best = _rounded(round_columns(target, lattice, factor), lattice, target, hessian)
    best = best.or_better(_rounded(lattice.nearest(target), lattice, target, hessian))
    return refine(best, target, hessian, hessian_weight, config.sweeps)


def _rounded(steps: torch.Tensor, lattice: Lattice, target: torch.Tensor, hessian: torch.Tensor) -> Rounded:
    return Rounded(steps, lattice, gradient_and_loss(steps, lattice, target, hessian)[1])
