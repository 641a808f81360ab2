"""The same text in the full-precision model, beside the one being quantized: what a layer reads in either.

Beside a layer's input stands the residual stream that its output is added to. In a block that adds the outputs of
attention and of the MLP to what enters it (all of `models/architectures.py` do), the stream in front of a layer is
known, and with it the error that earlier layers have left there.
"""

import contextlib
from collections.abc import Sequence

import torch

from quasar_core.errors import QuasarError
from quasar_core.quantize.activations import Activations, Batch, Stop, run_block
from quasar_core.quantize.asymmetric import lone_errors
from quasar_core.quantize.hessian import HessianAccumulator
from quasar_core.quantize.kept import Ending, first_output
from quasar_core.quantize.products import product

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
    ending: Ending | None = None,
) -> HessianAccumulator:
    """What reaches layers of one input, batch by batch, in the block being quantized and in the block as it was.

    Where a lone layer ends a module, what it reads is kept; of the block as it was, what it gives.
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
            errors = lone_errors(own.weight, errors, None if standing is None or aim is None else aim - standing)
        accumulator.add(inputs, errors)
        if ending is not None:
            activations.kept.keep(ending, batch.rows, inputs, linear.out_features)
            outputs = product(wanted, own.weight, own.bias)
            activations.reference.kept.keep(ending, batch.rows, outputs, own.out_features)
    if ending is not None:
        activations.reference.kept.finished(ending, own.out_features)
    return accumulator


def reach(
    block: torch.nn.Module, name: str, before: Sequence[str] | None, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The input of a layer, and the stream in front of it: what entered the block and what layers `before` added."""
    inputs: list[torch.Tensor] = []
    endings = {earlier: earlier.rpartition(".")[0] for earlier in before or ()}
    added = [first_output(batch.outputs[module]) for module in endings.values() if module in batch.outputs]
    running = [earlier for earlier, module in endings.items() if module not in batch.outputs]

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
