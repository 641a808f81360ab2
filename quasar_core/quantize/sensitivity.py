"""What each layer costs at each width: the divergence of a model in which that layer alone is quantized.

The rows go through the model block by block. At a block, each group of layers that read one input is put in place of
the original at one width, and the rows go on from there through the blocks that are left. That gives the price of a
unit of the solver's loss in this place, and the other widths cost their losses at this price: the divergence of a small
error is a quadratic form of it, and so is the loss. The two go together to a few hundredths; a divergence measured at
every width chooses no better, and takes six times the passes (docs/log.md). Groups share a width, so that a fused
product stays one. Letters: N rows of L tokens, V vocabulary.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from quasar_core.checkpoint.packing import count_groups, why_not_packable
from quasar_core.config import BITS
from quasar_core.quantize.activations import Activations
from quasar_core.quantize.allocate import Choice
from quasar_core.quantize.blocks import find_blocks, find_head, linear_layers
from quasar_core.quantize.factor import InverseFactor, inverse_factor
from quasar_core.quantize.fidelity import kl_divergence
from quasar_core.quantize.gptq import Solution, SolverConfig, column_order, solve_layer
from quasar_core.quantize.layerwise import hessian_of, replace_weight
from quasar_core.quantize.stages import collect_inputs, stages
from quasar_core.records import Progress, no_progress

FINE_GROUPS = (64, 32)  # smaller groups are steps between two widths
FINE_BITS = (3, 4)
MEASURED_BITS = 3  # errors small enough for a quadratic form, and large enough to be seen on few rows
ROWS = 8  # of the calibration text, which the divergence is measured on


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one width, by full name, and what each width costs."""

    names: tuple[str, ...]
    choices: tuple[Choice, ...]


@torch.inference_mode()
def measure_widths(
    model: PreTrainedModel, activations: Activations, default: SolverConfig, progress: Progress = no_progress
) -> list[LayerGroup]:
    """Every group of layers of a whole model, and the mean KL in nats that each width of it costs on these rows.

    At the end `activations` hold what left the last block.
    """
    prefix, blocks = find_blocks(model)
    target = _finish(activations, list(blocks))
    found: list[LayerGroup] = []
    for index, block in enumerate(blocks):
        progress("measuring widths", index, len(blocks))
        layers, after = linear_layers(block), list(blocks[index + 1 :])
        for stage in stages(block, layers, activations):
            inputs = collect_inputs(block, stage, layers, activations)
            for names in stage.groups:
                hessian = hessian_of(f"{prefix}.{index}.{names[0]}", layers[names[0]], inputs.pop(names[0]))
                solver = GroupSolver.of({name: layers[name] for name in names}, hessian, default)
                changed = solver.put_into(block)
                cost = _divergence(model, target, _finish(activations, [changed, *after]))
                found.append(LayerGroup(tuple(f"{prefix}.{index}.{name}" for name in names), solver.choices(cost)))
        activations.advance(block)
    progress("measuring widths", len(blocks), len(blocks))
    return found


@dataclass(frozen=True)
class GroupSolver:
    """Layers of one Hessian, by their names in the block, and the widths [W] that they may have."""

    layers: Mapping[str, torch.nn.Linear]
    hessian: torch.Tensor
    factor: InverseFactor
    widths: Sequence[SolverConfig]

    @classmethod
    def of(cls, layers: Mapping[str, torch.nn.Linear], hessian: torch.Tensor, default: SolverConfig) -> "GroupSolver":
        """With the one factor that all widths share."""
        order = column_order(hessian, default.act_order)
        factor = inverse_factor(hessian, order, default.damp, next(iter(layers)))
        return cls(layers, hessian, factor, possible_widths(replace(default, sweeps=0), list(layers.values())))

    @property
    def measured(self) -> SolverConfig:
        """The width whose divergence is measured."""
        return next(width for width in self.widths if width.bits >= MEASURED_BITS)

    def put_into(self, block: torch.nn.Module) -> torch.nn.Module:
        """A copy of the block in which these layers alone are quantized, at the width that is measured."""
        changed = copy.deepcopy(block)
        linears = linear_layers(changed)
        for name, solution in self._solve(self.measured).items():
            replace_weight(linears[name], solution.weight.dequantize(linears[name].weight.dtype))
        return changed

    def choices(self, cost: float) -> tuple[Choice, ...]:
        """Every width's bytes and cost in nats, where `cost` is that of the width that is measured."""
        losses = {width: sum(solution.loss for solution in self._solve(width).values()) for width in self.widths}
        price = cost / losses[self.measured] if losses[self.measured] > 0 else 0.0
        return tuple(
            Choice(width.bits, width.group_size, self._bytes(width), price * loss) for width, loss in losses.items()
        )

    def _solve(self, width: SolverConfig) -> dict[str, Solution]:
        return {
            name: solve_layer(linear.weight, self.hessian, self.factor, width, None, name)
            for name, linear in self.layers.items()
        }

    def _bytes(self, width: SolverConfig) -> int:
        return sum(stored_bytes(linear, width.bits, width.group_size) for linear in self.layers.values())


def stored_bytes(linear: torch.nn.Linear, bits: int, group_size: int) -> int:
    """Bytes of codes, scales and zeros of a layer."""
    groups = count_groups(linear.in_features, group_size)
    return linear.out_features * (linear.in_features + groups) * bits // 8 + 2 * groups * linear.out_features


def possible_widths(default: SolverConfig, linears: Sequence[torch.nn.Linear]) -> list[SolverConfig]:
    """Every width with the groups asked for; some with smaller groups, too: steps between two widths."""
    found = [replace(default, bits=bits) for bits in BITS]
    found += [
        replace(default, bits=bits, group_size=size)
        for bits in FINE_BITS
        for size in FINE_GROUPS
        if default.group_size == -1 or size < default.group_size
    ]
    sizes = [(linear.in_features, linear.out_features) for linear in linears]
    return [config for config in found if all(why_not_packable(*size, config.bits) is None for size in sizes)]


def _finish(activations: Activations, blocks: Sequence[torch.nn.Module]) -> torch.Tensor:
    """What leaves the last of the blocks [N, L, H]; the activations stay where they are."""
    states = activations.fork()
    for block in blocks:
        states.advance(block)
    return states.hidden


def _divergence(model: PreTrainedModel, target: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL in nats between two models of one head, by what leaves their last blocks [N, L, H]."""
    norm, head = find_head(model)
    place = head.weight.device
    rows = [
        kl_divergence(head(norm(p.to(place))).float(), head(norm(q.to(place))).float())
        for p, q in zip(target, other, strict=True)
    ]
    return torch.cat(rows).double().mean().item()
