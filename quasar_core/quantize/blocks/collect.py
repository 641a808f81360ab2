"""Collect a block's statistics for the solver: the layers that share a pass over the text, and their Hessians.

The error is measured against the same layer of the full-precision model, and the residual stream that its output is
added to: in a block that adds the outputs of attention and of the MLP to its input (all of
`models/architectures.py` do), the stream in front of a layer is known, and with it the error that earlier layers have
left there. Which modules end in a linear layer is found by running the block on one row, not from a table of
architectures.
"""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from quasar_core.errors import QuasarError
from quasar_core.models.hf.experts import SeparateExperts
from quasar_core.quantize.blocks.activations import Activations, Batch, OutputLayer, Stop, first_output, run_block
from quasar_core.quantize.solve.hessian import HessianAccumulator, output_error
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
    return ".experts." in layer_name


def has_too_few_samples(layer_name: str, linear: torch.nn.Linear, rows: int) -> bool:
    """Tell whether a layer is an expert's, and has read too few rows for a Hessian."""
    return is_expert(layer_name) and rows * MOST_INPUTS_PER_ROW < linear.in_features


def stages(block: torch.nn.Module, layers: dict[str, torch.nn.Linear], activations: Activations) -> list[Stage]:
    """A block's layers in the order they run; those that read the same tensor (q, k, v; gate, up) share a group.

    Experts read a part of the text each, found out anew in every pass: their input layers make one stage, their
    output layers the next, or several, so that the Hessians of a stage fit `HESSIAN_BYTES`.
    """
    order: dict[object, list[str]] = {}
    kept: list[torch.Tensor] = []  # alive until the end, so that no address is used twice
    experts = {name: module for name, module in block.named_modules() if isinstance(module, SeparateExperts)}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            kept.append(args[0])
            key = name if name in experts else (args[0].data_ptr(), args[0].shape[-1])
            order.setdefault(key, []).append(name)

        return hook

    watched = {**{name: linear for name, linear in layers.items() if not is_expert(name)}, **experts}
    handles = [module.register_forward_pre_hook(watch(name)) for name, module in watched.items()]
    try:
        run_block(block, activations.first_row())
    finally:
        for handle in handles:
            handle.remove()
    found: list[Stage] = []
    for names in order.values():
        found += (
            expert_stages(names[0], experts[names[0]]) if names[0] in experts else [Stage([names], layers[names[0]])]
        )
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


def collect_inputs(
    block: torch.nn.Module,
    stage: Stage,
    layers: dict[str, torch.nn.Linear],
    activations: Activations,
    output_layer: OutputLayer | None = None,
) -> dict[str, HessianAccumulator]:
    """Sum the Hessian of every group's inputs; each pass stops after the stage.

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
        for batch in activations.batches():
            with contextlib.suppress(Stop):
                run_block(block, batch)
            if output_layer is not None:
                activations.cache.store(output_layer, batch.rows, last[0], layers[output_layer.layer].out_features)
    finally:
        for handle in handles:
            handle.remove()
    return accumulators


STREAM_LAYERS = ("o_proj", "down_proj")  # by the last part of their names


def stream_layers(block: torch.nn.Module, names: Sequence[str], activations: Activations) -> list[str]:
    """Layers whose outputs the block adds to its hidden states, in order; none where that is not all that it does.

    Tried on one row: a block with norms behind its layers, or with experts, gives something else.
    """
    found = [name for name in names if name.rpartition(".")[2] in STREAM_LAYERS and ".experts." not in name]
    row = activations.first_row()
    outputs: list[torch.Tensor] = [row.hidden]
    handles = [block.get_submodule(name).register_forward_hook(lambda m, a, out: outputs.append(out)) for name in found]
    try:
        left = run_block(block, row)
    finally:
        for handle in handles:
            handle.remove()
    if len(found) != len(STREAM_LAYERS) or any(out.shape != left.shape for out in outputs):
        return []
    total = torch.stack([out.float() for out in outputs]).sum(dim=0)
    error = (total - left.float()).norm() / left.float().norm()
    return found if error < 8 * torch.finfo(left.dtype).eps else []


def collect_compared(
    block: torch.nn.Module,
    original: torch.nn.Module,
    group: Sequence[str],
    stream: Sequence[str],
    activations: Activations,
    output_layer: OutputLayer | None = None,
) -> HessianAccumulator:
    """Sum the Hessian of a group's inputs, and their correlation with the error against the original block.

    Of an output layer the inputs are cached; of the original one, the outputs.
    """
    name = group[0]
    linear, own = block.get_submodule(name), original.get_submodule(name)
    assert isinstance(linear, torch.nn.Linear)
    assert isinstance(own, torch.nn.Linear)
    assert activations.reference is not None
    before = stream[: stream.index(name)] if name in stream else None
    accumulator = HessianAccumulator(linear.in_features, linear.weight.device)
    for batch, reference in activations.pairs():
        inputs, standing = reach(block, name, before, batch)
        wanted, aim = reach(original, name, before, reference)
        errors = wanted - inputs
        if len(group) == 1:
            errors = output_error(own.weight, errors, None if standing is None or aim is None else aim - standing)
        accumulator.add(inputs, errors)
        if output_layer is not None:
            activations.cache.store(output_layer, batch.rows, inputs, linear.out_features)
            outputs = product(wanted, own.weight, own.bias)
            activations.reference.cache.store(output_layer, batch.rows, outputs, own.out_features)
    if output_layer is not None:
        activations.reference.cache.mark_finished(output_layer, own.out_features)
    return accumulator


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


@dataclass(frozen=True)
class Call:
    """What a module of the block read and gave."""

    name: str
    read: tuple[Any, ...]
    gave: Any


def find_output_layers(
    block: torch.nn.Module, names: Sequence[str], activations: Activations
) -> dict[str, OutputLayer]:
    """Layers whose output is their module's output, each with its module; none where passes run on a GPU.

    A module that ends in no layer of its own (a mixture of experts), or that gives more than the layer's output, is
    left out. On a GPU running a module again takes less time than moving its outputs to the host and back.
    """
    if activations.device.type != "cpu":
        return {}
    modules = {name: name.rpartition(".")[0] for name in names if "." in name and ".experts." not in name}
    calls, left = _watch({*modules, *modules.values(), *dict(block.named_children())}, block, activations)
    row, found = activations.first_row(), {}
    for layer, module in itertools.pairwise(calls):
        once = sum(call.name in (layer.name, module.name) for call in calls) == 2
        if modules.get(layer.name) == module.name and once and _gives(module, layer, row.hidden.shape):
            feeders = tuple(call.name for call in calls if any(call.gave is value for value in module.read))
            length = len(module.gave) if isinstance(module.gave, tuple) else None
            for output_layer in (
                OutputLayer(module.name, layer.name, length, feeders),
                OutputLayer(module.name, layer.name, length),
            ):
                if torch.equal(run_block(block, replace(row, outputs=output_layer.outputs(layer.gave))), left):
                    found[layer.name] = output_layer
                    break
    return found


def _watch(names: set[str], block: torch.nn.Module, activations: Activations) -> tuple[list[Call], torch.Tensor]:
    """Record the calls of these modules on one row, as they return, and the outputs of the block."""
    calls: list[Call] = []

    def watch(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs, output: calls.append(Call(name, (*args, *kwargs.values()), output))

    handles = [block.get_submodule(name).register_forward_hook(watch(name), with_kwargs=True) for name in names]
    try:
        return calls, run_block(block, activations.first_row())
    finally:
        for handle in handles:
            handle.remove()


def _gives(module: Call, layer: Call, shape: torch.Size) -> bool:
    """Whether the module gives what the layer gives, to the last bit and token by token, and nothing beside it."""
    beside = module.gave[1:] if isinstance(module.gave, tuple) else ()
    return (
        layer.read[0].shape[:2] == layer.gave.shape[:2] == shape[:2]
        and torch.equal(first_output(module.gave), layer.gave)
        and all(other is None for other in beside)
    )
