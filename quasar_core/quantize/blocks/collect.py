"""Collect a block's statistics for the solver: the layers that share a pass over the text, and their Hessians.

The error is measured against the same layer of the full-precision model, and the residual stream that its output is
added to: in a block that adds the outputs of attention and of the MLP to its input (all of
`models/architectures` do), the stream in front of a layer is known, and with it the error that earlier layers have
left there. The order of layers, and the modules that end in a linear layer, are read off a run of the block on one row,
not off a table of architectures.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from quasar_core.errors import QuasarError
from quasar_core.models.hf.experts import SeparateExperts
from quasar_core.quantize.blocks.activations import Activations, Batch, OutputLayer, Stop, first_output, run_block
from quasar_core.quantize.blocks.streaming import linear_layers
from quasar_core.quantize.blocks.target_context import TargetContext
from quasar_core.quantize.solve.hessian import HessianAccumulator, wanted_outputs
from quasar_core.quantize.solve.matmul import product

HESSIAN_BYTES = 1_000_000_000  # of the experts whose inputs are collected in one pass
# Inputs per row that an expert has read: above it GPTQ hardly gains on rounding to nearest.
MOST_INPUTS_PER_ROW = 128


@dataclass(frozen=True)
class Stage:
    """Layers that are solved on one pass: groups of them that share an input, and the module where the pass ends."""

    groups: Sequence[Sequence[str]]
    last: torch.nn.Module


def is_expert(layer_name: str) -> bool:
    """Tell whether a layer belongs to one of several experts, which read a part of the text each."""
    return ".experts." in f".{layer_name}"  # they may stand in the block itself


def has_too_few_samples(layer_name: str, linear: torch.nn.Linear, rows: int) -> bool:
    """Tell whether a layer is an expert's, and has read too few rows for a Hessian."""
    return is_expert(layer_name) and rows * MOST_INPUTS_PER_ROW < linear.in_features


@dataclass(frozen=True)
class Call:
    """A module's name, arguments and output."""

    name: str
    read: tuple[Any, ...]
    gave: Any


@dataclass(frozen=True)
class Trace:
    """What a block did with one row: the calls of its modules in the order in which they return, and its output."""

    block: torch.nn.Module
    row: Batch
    calls: list[Call]
    output: torch.Tensor


def trace_block(block: torch.nn.Module, activations: Activations) -> Trace:
    """Run a block on one row, and record its linear layers outside experts, the modules that hold them, and experts."""
    layers = [name for name in linear_layers(block) if not is_expert(name)]
    names = {*layers, *(name.rpartition(".")[0] for name in layers), *experts_of(block), *dict(block.named_children())}
    calls: list[Call] = []

    def record(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs, output: calls.append(Call(name, (*args, *kwargs.values()), output))

    modules = [(name, block.get_submodule(name)) for name in sorted(names - {""})]
    handles = [module.register_forward_hook(record(name), with_kwargs=True) for name, module in modules]
    row = activations.first_row()
    try:
        return Trace(block, row, calls, run_block(block, row))
    finally:
        for handle in handles:
            handle.remove()


def experts_of(block: torch.nn.Module) -> dict[str, SeparateExperts]:
    """Return the modules of a block that hold experts, by name."""
    return {name: module for name, module in block.named_modules() if isinstance(module, SeparateExperts)}


def find_stages(trace: Trace) -> list[Stage]:
    """Order a block's layers as they run; those that read the same tensor (q, k, v; gate, up) share a group.

    Experts read a part of the text each, found out anew in every pass: their input layers make one stage, their
    output layers the next, or several, so that the Hessians of a stage fit `HESSIAN_BYTES`.
    """
    layers, experts = linear_layers(trace.block), experts_of(trace.block)
    order: dict[object, list[str]] = {}
    for call in trace.calls:  # which hold the tensors, so that no address is used twice
        if call.name in experts:
            order[call.name] = [call.name]
        elif call.name in layers:
            order.setdefault((call.read[0].data_ptr(), call.read[0].shape[-1]), []).append(call.name)
    found: list[Stage] = []
    for first, *others in order.values():
        stage = Stage([[first, *others]], layers[first]) if first in layers else None
        found += [stage] if stage else expert_stages(first, experts[first])
    return found


def expert_stages(name: str, experts: SeparateExperts) -> list[Stage]:
    """Input layers of all experts, then output layers, as many at a time as `HESSIAN_BYTES` allow."""
    found: list[Stage] = []
    for parts in (("gate_proj", "up_proj"), ("down_proj",)):
        groups = [[f"{name}.{index}.{part}" for part in parts] for index in range(len(experts.experts()))]
        inputs = cast(torch.nn.Linear, getattr(experts.experts()[0], parts[0])).in_features
        at_once = max(1, HESSIAN_BYTES // (4 * inputs**2))
        found += [Stage(groups[i : i + at_once], experts) for i in range(0, len(groups), at_once)]
    return found


# By the last part of their names: of what mixes tokens, and of the MLP.
STREAM_LAYERS = (("o_proj", "out_proj"), ("down_proj", "w2", "output_linear"))


def find_stream_layers(trace: Trace) -> list[str]:
    """Find the layers whose outputs the block adds to its hidden states, in order; none where it does more than that.

    A block with norms behind its layers, or with experts, computes something else.
    """
    names = {name for part in STREAM_LAYERS for name in part}
    added = [call for call in trace.calls if call.name.rpartition(".")[2] in names]
    outputs = [trace.row.hidden, *(call.gave for call in added)]
    if len(added) != len(STREAM_LAYERS) or any(output.shape != trace.output.shape for output in outputs):
        return []
    total, whole = torch.stack([output.float() for output in outputs]).sum(dim=0), trace.output.float()
    error = (total - whole).norm() / whole.norm()
    return [call.name for call in added] if error < 8 * torch.finfo(trace.output.dtype).eps else []


def find_output_layers(trace: Trace) -> dict[str, OutputLayer]:
    """Find the layers whose output is their module's output; none where passes run on a GPU.

    A module that ends in no layer of its own (a mixture of experts), or whose output is more than the layer's, is left
    out. On a GPU running a module again takes less time than moving its outputs to the host and back.
    """
    found: dict[str, OutputLayer] = {}
    if trace.row.hidden.device.type != "cpu":
        return found
    layers, shape = linear_layers(trace.block), trace.row.hidden.shape
    for layer, module in itertools.pairwise(trace.calls):
        once = sum(call.name in (layer.name, module.name) for call in trace.calls) == 2
        is_last = layer.name in layers and layer.name.rpartition(".")[0] == module.name
        if is_last and once and _gives(module, layer, shape):
            feeders = tuple(call.name for call in trace.calls if any(call.gave is value for value in module.read))
            length = len(module.gave) if isinstance(module.gave, tuple) else None
            for feeds in (feeders, ()):
                output_layer = OutputLayer(module.name, layer.name, length, feeds)
                batch = replace(trace.row, outputs=output_layer.outputs(layer.gave))
                if torch.equal(run_block(trace.block, batch), trace.output):
                    found[layer.name] = output_layer
                    break
    return found


def attends_uncached(trace: Trace, output_layers: Mapping[str, OutputLayer]) -> bool:
    """Tell whether a block's attention still runs once the outputs of these layers' modules are cached."""
    outputs: dict[str, Any] = {}
    for call in trace.calls:
        if call.name in output_layers:
            outputs |= output_layers[call.name].outputs(call.gave)
    context = TargetContext()
    run_block(trace.block, replace(trace.row, outputs=outputs, attention=context.note()))
    return bool(context.noted)


def _gives(module: Call, layer: Call, shape: torch.Size) -> bool:
    """Tell whether the module's output is the layer's, to the last bit and token by token, and nothing beside it."""
    beside = module.gave[1:] if isinstance(module.gave, tuple) else ()
    return (
        layer.read[0].shape[:2] == layer.gave.shape[:2] == shape[:2]
        and torch.equal(first_output(module.gave), layer.gave)
        and all(other is None for other in beside)
    )


def collect_inputs(
    block: torch.nn.Module,
    stage: Stage,
    layers: dict[str, torch.nn.Linear],
    activations: Activations,
    output_layer: OutputLayer | None = None,
    batches: Iterable[Batch] | None = None,
) -> dict[str, HessianAccumulator]:
    """Sum the Hessian of every group's inputs; each pass, over all batches of the activations, stops after the stage.

    The inputs of an output layer are cached.
    """
    accumulators = {
        group[0]: HessianAccumulator(layers[group[0]].in_features, layers[group[0]].weight.device)
        for group in stage.groups
    }
    last: list[torch.Tensor] = []  # read by a layer in this batch

    def take(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            accumulators[name].add(args[0])
            last[:] = args
            if module is stage.last:
                raise Stop  # its product is not needed

        return hook

    def end(*_: object) -> None:
        raise Stop

    handles = [layers[name].register_forward_pre_hook(take(name)) for name in accumulators]
    handles.append(stage.last.register_forward_hook(end))
    try:
        for batch in activations.batches() if batches is None else batches:
            with contextlib.suppress(Stop):
                run_block(block, batch)
            if output_layer is not None:
                activations.cache.store(output_layer, batch.rows, last[0], layers[output_layer.layer].out_features)
    finally:
        for handle in handles:
            handle.remove()
    return accumulators


def collect_compared(
    block: torch.nn.Module,
    original: torch.nn.Module,
    group: Sequence[str],
    stream: Sequence[str],
    activations: Activations,
    context: TargetContext,
    output_layer: OutputLayer | None = None,
) -> HessianAccumulator:
    """Sum the Hessian of a group's inputs, and their correlation with the error against the original block.

    Half of the rows read the original's keys and values. Of a lone layer the wanted outputs are summed, and what its
    own weight makes of the inputs is subtracted at the end. Of an output layer the inputs are cached; of the original
    one, the outputs.
    """
    name = group[0]
    linear, own = block.get_submodule(name), original.get_submodule(name)
    assert isinstance(linear, torch.nn.Linear)
    assert isinstance(own, torch.nn.Linear)
    assert activations.reference is not None
    before = stream[: stream.index(name)] if name in stream else None
    lone = len(group) == 1
    accumulator = HessianAccumulator(linear.in_features, linear.weight.device)
    for batch, reference in activations.pairs(context):
        wanted, aim = reach(original, name, before, reference)
        inputs, standing = reach(block, name, before, batch)
        errors = wanted - inputs
        if lone or output_layer is not None:
            outputs = product(wanted, own.weight, own.bias)
        if lone:
            unbiased = outputs if own.bias is None else outputs - own.bias
            errors = wanted_outputs(unbiased, None if standing is None or aim is None else aim - standing)
        accumulator.add(inputs, errors)
        if output_layer is not None:
            activations.cache.store(output_layer, batch.rows, inputs, linear.out_features)
            activations.reference.cache.store(output_layer, batch.rows, outputs, own.out_features)
    if lone:
        accumulator.subtract_outputs(own.weight)
    if output_layer is not None:
        activations.reference.cache.mark_finished(output_layer, own.out_features)
    return accumulator


def batches_beside(original: torch.nn.Module, activations: Activations, context: TargetContext) -> Iterator[Batch]:
    """Batches that read the original's keys and values, for which the reference runs through it first."""
    for batch, reference in activations.pairs(context):
        run_block(original, reference)
        yield batch


def reach(
    block: torch.nn.Module, name: str, before: Sequence[str] | None, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a layer's inputs, and the residual stream before it: the block's inputs + outputs of layers `before`."""
    inputs: list[torch.Tensor] = []
    output_layers = {earlier: earlier.rpartition(".")[0] for earlier in before or ()}
    added = [first_output(batch.outputs[module]) for module in output_layers.values() if module in batch.outputs]
    running = [earlier for earlier, module in output_layers.items() if module not in batch.outputs]

    def take(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inputs.append(args[0])
        raise Stop

    def note(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        added.append(output)

    handles = [block.get_submodule(name).register_forward_pre_hook(take)]
    handles += [block.get_submodule(earlier).register_forward_hook(note) for earlier in running]
    try:
        with contextlib.suppress(Stop):
            run_block(block, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not inputs:
        raise QuasarError(f"Layer {name} saw no calibration input.")
    stream = None if before is None else sum(added, batch.hidden)
    return inputs[0], stream
