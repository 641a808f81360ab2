"""Quantize one decoder block after the other: collect activations, solve, replace the weights, run the block.

The Hessian of a layer is that of its activations in the blocks already quantized and, within the block, behind the
layers already quantized (`true_sequential`). Each finished block is written to the partial folder, from where an
interrupted run goes on.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedModel

from quasar_core.checkpoint.compressed_tensors import PackedWeight
from quasar_core.malloc import FREED_BYTES, return_freed_memory
from quasar_core.models.hf.skeleton import clone_structure
from quasar_core.quantize.blocks.activations import Activations
from quasar_core.quantize.blocks.collect import (
    attends_uncached,
    batches_beside,
    collect_compared,
    collect_inputs,
    find_output_layers,
    find_stages,
    find_stream_layers,
    has_too_few_samples,
    is_expert,
    trace_block,
)
from quasar_core.quantize.blocks.streaming import find_blocks, find_head, linear_layers
from quasar_core.quantize.blocks.target_context import TargetContext
from quasar_core.quantize.commits import (
    Layout,
    QuantizedBlock,
    block_file,
    head_file,
    own_name,
    read_commit,
    write_commit,
)
from quasar_core.quantize.layer_plan import HEAD, LayerPlan
from quasar_core.quantize.solve.gptq import Solution, SolverConfig, solve, solve_group
from quasar_core.quantize.solve.hessian import HessianAccumulator, error_correlation, shrunk
from quasar_core.records import Progress, no_progress


class GroupSolver(Protocol):
    """Quantizes layers [out, in] of one H [in, in]; `gptq.solve_group` is one."""

    def __call__(
        self,
        weights: Mapping[str, torch.Tensor],
        hessian: torch.Tensor,
        configs: Mapping[str, SolverConfig],
        correlations: MutableMapping[str, torch.Tensor] | None = None,
    ) -> dict[str, Solution]:
        """Solve layers, all by their full names."""
        ...


@dataclass(frozen=True)
class Preparation:
    """How a block's layers are solved and stored, and by full name the other tensors that the verifier replaces."""

    solve: GroupSolver = solve_group
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    layout: Layout = "gptq"


# Changes a block of that name, before its layers are quantized, to another that computes the same.
Prepare = Callable[[torch.nn.Module, str, Activations], Preparation]


def leave_block(block: torch.nn.Module, name: str, activations: Activations) -> Preparation:
    """GPTQ's `Prepare`: nothing to change."""
    return Preparation()


class Blocks(Protocol):
    """Where blocks come from: each call makes one of its own, on the device, to be changed at will."""

    prefix: str
    count: int

    def block(self, index: int) -> torch.nn.Module:
        """Return the block of that number."""
        ...

    def stored(self, name: str) -> str:
        """Return the name that the model's files have for a layer or tensor."""
        ...


class BlocksInMemory:
    """The blocks of a model that is loaded already."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.prefix, self._blocks = find_blocks(model)
        self.count = len(self._blocks)

    def block(self, index: int) -> torch.nn.Module:
        """A copy."""
        return copy.deepcopy(self._blocks[index])

    def stored(self, name: str) -> str:
        """Return the model's own name."""
        return own_name(name)


def quantize_blocks(
    source: Blocks | PreTrainedModel,
    activations: Activations,
    plan: LayerPlan | SolverConfig,
    commits: Path,
    progress: Progress = no_progress,
    prepare: Prepare = leave_block,
) -> Iterator[QuantizedBlock]:
    """Quantize every block on the activations before the first; the model stays as it is. Yields finished blocks.

    At the end `activations` hold the outputs of the last block. A block that has a commit is read from it. A reference
    runs through the original blocks, and layers are fitted to its outputs (`solve/hessian.py`).
    """
    return_freed_memory()  # of what came before
    blocks = BlocksInMemory(source) if isinstance(source, PreTrainedModel) else source
    plan = LayerPlan(plan) if isinstance(plan, SolverConfig) else plan
    for index in range(blocks.count):
        progress("quantizing", index, blocks.count)
        yield quantize_one(blocks, index, activations, plan, commits, prepare)
        return_freed_memory()
    progress("quantizing", blocks.count, blocks.count)


@torch.inference_mode()
def quantize_one(
    blocks: Blocks, index: int, activations: Activations, plan: LayerPlan, commits: Path, prepare: Prepare
) -> QuantizedBlock:
    """Quantize and commit one block, or read its commit; then run it on the activations."""
    work, commit = blocks.block(index), block_file(commits, index)
    name = f"{blocks.prefix}.{index}"
    if commit.exists():
        done = read_commit(commit)
        original = None
        if activations.reference is not None:
            prepare(work, name, activations)  # as in the run that made the commit, to the last bit
            original = clone_structure(work)
        replace_weights(work, name, done)
        advance(activations, work, original)
    else:
        done = quantize_block(work, name, activations, plan, prepare(work, name, activations))
        write_commit(commit, done, blocks.stored)
    return done


def advance(activations: Activations, block: torch.nn.Module, original: torch.nn.Module | None) -> None:
    """Run a quantized block, beside the original one where that is still to run."""
    if original is None:
        activations.advance(block)
    else:
        activations.advance_both(block, original)


def quantize_block(
    block: torch.nn.Module, name: str, activations: Activations, plan: LayerPlan, prepared: Preparation
) -> QuantizedBlock:
    """Quantize a block's linear layers in the order they run; replace their weights in place, and run the block."""
    weights: dict[str, PackedWeight] = {}
    losses: dict[str, float] = {}
    rounded: list[str] = []
    layers = linear_layers(block)
    original = None if activations.reference is None else clone_structure(block)
    trace = trace_block(block, activations)
    found, stream, output_layers = find_stages(trace), find_stream_layers(trace), find_output_layers(trace)
    has_uncached_attention = attends_uncached(trace, output_layers)
    context = TargetContext()
    del trace
    for stage in found:
        first = stage.groups[0][0]
        output_layer = output_layers.get(first)
        make_room(layers[first])
        if original is None:
            inputs = collect_inputs(block, stage, layers, activations, output_layer)
        elif is_expert(first):  # in the two models, other tokens may be routed to an expert
            batches = batches_beside(original, activations, context) if has_uncached_attention else None
            inputs = collect_inputs(block, stage, layers, activations, output_layer, batches)
        else:
            both = (block, original, stage.groups[0], stream)
            inputs = {first: collect_compared(*both, activations, context, output_layer)}
        is_last = stage is found[-1] and not has_uncached_attention
        if is_last and original is not None and activations.reference is not None:
            activations.reference.advance(original)
            original = None  # its weights make room for the solver
        make_room(layers[first])
        for group in stage.groups:
            own = {f"{name}.{layer}": layers[layer] for layer in group}
            if has_too_few_samples(group[0], layers[group[0]], inputs[group[0]].count):
                rounded.extend(own)
            for full_name, solution in solve_together(own, inputs.pop(group[0]), plan, prepared.solve).items():
                weights[full_name], losses[full_name] = solution.weight, solution.relative_loss
                replace_weight(own[full_name], solution.weight.dequantize(own[full_name].weight.dtype))
        if output_layer is not None:
            activations.cache.finish(output_layer, layers[first])
    advance(activations, block, original)
    return QuantizedBlock(weights, losses, dict(prepared.tensors), tuple(rounded), prepared.layout)


def make_room(linear: torch.nn.Linear) -> None:
    """Return freed memory where a layer's Hessian is larger than what glibc keeps."""
    if 4 * linear.in_features**2 > FREED_BYTES:
        return_freed_memory()


def solve_together(
    own: Mapping[str, torch.nn.Linear], sums: HessianAccumulator, plan: LayerPlan, solve_layers: GroupSolver
) -> dict[str, Solution]:
    """Solve layers of one input, by their full names, from the sums over their inputs, which are consumed."""
    hessian, errors = hessian_of(*next(iter(own.items())), sums), sums.errors()
    weights = {name: linear.weight for name, linear in own.items()}
    correlations = {} if errors is None else error_correlation(weights, errors)
    del sums, errors  # as large as the Hessian, and not needed for the codes
    return solve_layers(weights, hessian, {name: plan.solver(name) for name in own}, correlations)


def hessian_of(name: str, linear: torch.nn.Linear, sums: HessianAccumulator) -> torch.Tensor:
    """Return H of a layer; with too few samples the identity, under which solving is rounding to nearest."""
    if has_too_few_samples(name, linear, sums.count):
        return torch.eye(linear.in_features, device=linear.weight.device)
    return shrunk(sums.finish(name), sums.count)


def replace_weights(block: torch.nn.Module, name: str, done: QuantizedBlock) -> None:
    """Put what a commit holds into a block of the target: layers, and other tensors by their names."""
    layers = linear_layers(block)
    for full_name in done.weights:
        linear = layers[full_name.removeprefix(f"{name}.")]
        replace_weight(linear, done.dense(full_name, linear.weight.dtype))
    parameters = dict(block.named_parameters())
    for full_name, tensor in done.tensors.items():
        own = parameters.get(full_name.removeprefix(f"{name}."))
        if own is not None:
            own.data = tensor.to(own)


def replace_weight(linear: torch.nn.Linear, weight: torch.Tensor) -> None:
    """Give a layer another weight [out, in]; the tensor that it had is not written to."""
    linear.weight = torch.nn.Parameter(weight.to(linear.weight), requires_grad=False)


@torch.inference_mode()
def quantize_head(
    ends: PreTrainedModel,
    activations: Activations,
    plan: LayerPlan,
    commits: Path,
    stored: Callable[[str], str] = own_name,
) -> QuantizedBlock:
    """Quantize the head on the outputs of the last block; of the model, final norm and head are enough."""
    norm, head = find_head(ends)
    commit = head_file(commits)
    if not commit.exists():
        accumulator = HessianAccumulator(head.in_features, head.weight.device)
        for rows in activations.hidden.split(1):
            accumulator.add(norm(rows.to(head.weight.device)))
        solution = solve(head.weight, hessian_of(HEAD, head, accumulator), plan.solver(HEAD), HEAD)
        write_commit(commit, QuantizedBlock({HEAD: solution.weight}, {HEAD: solution.relative_loss}), stored)
    return read_commit(commit)
