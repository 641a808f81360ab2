"""What each layer costs at each width: the divergence of a model in which that layer alone is quantized.

The rows go through the model block by block. At a block, each group of layers that read one input is solved at every
width, put in place of the original, and the rows go on from there through the blocks that are left. Groups share a
width, so that a fused product stays one. Letters: N rows of L tokens, V vocabulary.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from quasar_core.checkpoint.packing import count_groups, why_not_packable
from quasar_core.config import BITS
from quasar_core.quantize.activations import Activations
from quasar_core.quantize.allocate import Choice
from quasar_core.quantize.blocks import find_blocks, find_head, linear_layers
from quasar_core.quantize.fidelity import kl_divergence
from quasar_core.quantize.gptq import SolverConfig, solve
from quasar_core.quantize.layerwise import collect_inputs, replace_weight, stages
from quasar_core.records import Progress, no_progress

FINE_GROUP = 32  # a smaller group is a step between two widths
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
        layers = linear_layers(block)
        for stage in stages(block, layers, activations):
            inputs = collect_inputs(block, stage, layers, activations)
            for group in stage.groups:
                hessian = inputs[group[0]].finish(f"{prefix}.{index}.{group[0]}")
                choices = []
                for config in _possible_widths(default, [layers[name] for name in group]):
                    changed = _quantized(block, group, hessian, config)
                    cost = _divergence(model, target, _finish(activations, [changed, *blocks[index + 1 :]]))
                    size = sum(stored_bytes(layers[name], config.bits, config.group_size) for name in group)
                    choices.append(Choice(config.bits, config.group_size, size, cost))
                found.append(LayerGroup(tuple(f"{prefix}.{index}.{name}" for name in group), tuple(choices)))
        activations.advance(block)
    progress("measuring widths", len(blocks), len(blocks))
    return found


def stored_bytes(linear: torch.nn.Linear, bits: int, group_size: int) -> int:
    """Bytes of codes, scales and zeros of a layer."""
    groups = count_groups(linear.in_features, group_size)
    return linear.out_features * (linear.in_features + groups) * bits // 8 + 2 * groups * linear.out_features


def _possible_widths(default: SolverConfig, linears: Sequence[torch.nn.Linear]) -> list[SolverConfig]:
    """Every width with the groups asked for; 3 and 4 bits with small groups, too: steps between two widths."""
    found = [replace(default, bits=bits) for bits in BITS]
    if default.group_size == -1 or default.group_size > FINE_GROUP:
        found += [replace(default, bits=bits, group_size=FINE_GROUP) for bits in (3, 4)]
    sizes = [(linear.in_features, linear.out_features) for linear in linears]
    return [config for config in found if all(why_not_packable(*size, config.bits) is None for size in sizes)]


def _quantized(
    block: torch.nn.Module, names: Sequence[str], hessian: torch.Tensor, config: SolverConfig
) -> torch.nn.Module:
    """A copy of the block in which these layers alone are quantized."""
    changed = copy.deepcopy(block)
    layers = linear_layers(changed)
    for name in names:
        solution = solve(layers[name].weight, hessian, replace(config, sweeps=0), name)
        replace_weight(layers[name], solution.weight.dequantize(layers[name].weight.dtype))
    return changed


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
