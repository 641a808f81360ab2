"""Which modules of a block end in a linear layer, found out by running it on one row. No table of architectures."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from quasar_core.quantize.activations import Activations, run_block
from quasar_core.quantize.kept import Ending, first_output


@dataclass(frozen=True)
class Call:
    """What a module of the block read and gave."""

    name: str
    read: tuple[Any, ...]
    gave: Any


def find_endings(block: torch.nn.Module, names: Sequence[str], activations: Activations) -> dict[str, Ending]:
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
            for ending in (Ending(module.name, layer.name, length, feeders), Ending(module.name, layer.name, length)):
                if torch.equal(run_block(block, replace(row, outputs=ending.outputs(layer.gave))), left):
                    found[layer.name] = ending
                    break
    return found


def _watch(names: set[str], block: torch.nn.Module, activations: Activations) -> tuple[list[Call], torch.Tensor]:
    """Calls of these modules in the order in which they return, on one row, and what leaves the block."""
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
