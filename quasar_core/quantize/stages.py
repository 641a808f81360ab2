"""Which layers of a block are solved on one pass of the text, and what that pass collects for them."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from quasar_core.models.experts import SeparateExperts
from quasar_core.quantize.activations import Activations, Stop, run_block
from quasar_core.quantize.hessian import HessianAccumulator
from quasar_core.quantize.kept import Ending

HESSIAN_BYTES = 1_000_000_000  # of the experts that are watched in one pass
# Inputs for each row that an expert has read, above which hardly anything is gained on rounding to nearest.
MOST_INPUTS_PER_ROW = 128


@dataclass(frozen=True)
class Stage:
    """Layers that are solved on one pass: groups of them that share an input, and the module where the pass ends."""

    groups: Sequence[Sequence[str]]
    last: torch.nn.Module


def is_expert(layer_name: str) -> bool:
    """Whether a layer belongs to one of several experts, which see a part of the text each."""
    return ".experts." in layer_name


def read_too_little(layer_name: str, linear: torch.nn.Linear, rows: int) -> bool:
    """Whether a layer is an expert's, and has read too few rows for a Hessian."""
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
    ending: Ending | None = None,
) -> dict[str, HessianAccumulator]:
    """What reaches the first layer of every group; each pass ends where the stage does.

    Where the stage's layer ends a module, what it reads is kept.
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
            if ending is not None:
                activations.kept.keep(ending, batch.rows, last[0], layers[ending.layer].out_features)
    finally:
        for handle in handles:
            handle.remove()
    return accumulators
