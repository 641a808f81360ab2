"""One decoder block after the other: collect inputs, solve, replace, pass on.

The Hessian of a layer is taken from inputs that went through the blocks already quantized, and, within the block,
through the layers already quantized (`true_sequential`). Each finished block is committed to the partial folder, from
where an interrupted run goes on.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from quasar_core.checkpoint.packing import QuantizedWeight, unpack_weight, why_not_packable
from quasar_core.checkpoint.writer import save_tensors
from quasar_core.errors import QuasarError
from quasar_core.quantize.gptq import SolverConfig, solve
from quasar_core.quantize.hessian import HessianAccumulator
from quasar_core.records import Progress, no_progress

BATCH_TOKENS = 8192


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


@dataclass
class Batch:
    """Hidden states [B, L, hidden] on their way through the blocks, and what each block takes beside them."""

    hidden: torch.Tensor
    kwargs_of_blocks: list[dict[str, Any]]
    block: int = 0  # the one that comes next

    @property
    def kwargs(self) -> dict[str, Any]:
        """What the next block takes; masks and rotary tables may differ between blocks."""
        return self.kwargs_of_blocks[self.block]

    def move_on(self, hidden: torch.Tensor) -> None:
        """Take what left the next block; the one after it comes next."""
        self.hidden = hidden
        self.block += 1


@dataclass(frozen=True)
class QuantizedBlock:
    """The layers of one block by full name, and the relative loss of each."""

    weights: dict[str, QuantizedWeight]
    losses: dict[str, float]


def find_blocks(model: PreTrainedModel) -> tuple[str, torch.nn.ModuleList]:
    """The list of decoder blocks and its name, such as `model.layers`."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return name, module
    raise QuasarError(f"No list of {count} decoder blocks was found in {type(model).__name__}.")


def find_head(model: PreTrainedModel) -> tuple[torch.nn.Module, torch.nn.Linear]:
    """The final norm and the head that reads it."""
    norm, head = getattr(model.base_model, "norm", None), getattr(model, "lm_head", None)
    if norm is None or not isinstance(head, torch.nn.Linear):
        raise QuasarError(f"--lm-head-bits: {type(model).__name__} has no final norm and lm_head to quantize.")
    return norm, head


def check_layers(model: PreTrainedModel, bits: int, head_bits: int) -> None:
    """Refuse, before any work, layers that the format cannot hold; the head counts where its codes are asked for."""
    prefix, blocks = find_blocks(model)
    wanted = [(f"{prefix}.{name}", linear, bits) for name, linear in linear_layers(blocks).items()]
    if head_bits < 16:
        wanted.append(("lm_head", find_head(model)[1], head_bits))
    for name, linear, width in wanted:
        obstacle = why_not_packable(linear.in_features, linear.out_features, width)
        if obstacle:
            raise QuasarError(f"Layer {name} cannot be packed: {obstacle}.")


def linear_layers(module: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linear layers inside a module by their name within it."""
    return {name: child for name, child in module.named_modules() if isinstance(child, torch.nn.Linear)}


@torch.inference_mode()
def quantize_blocks(
    model: PreTrainedModel,
    batches: list[Batch],
    config: SolverConfig,
    commits: Path,
    progress: Progress = no_progress,
) -> Iterator[QuantizedBlock]:
    """Quantize every block on what enters the first; the model itself stays as it is. Yields blocks as they are done.

    At the end `batches` hold what left the last block.
    """
    prefix, blocks = find_blocks(model)
    for index, block in enumerate(blocks):
        progress("quantizing", index, len(blocks))
        work = copy.deepcopy(block)
        commit = commits / f"block-{index:05d}.safetensors"
        if commit.exists():
            done = read_commit(commit, config)
            _replace_weights(work, f"{prefix}.{index}.", done.weights)
        else:
            done = quantize_block(work, f"{prefix}.{index}", batches, config)
            write_commit(commit, done)
        for batch in batches:
            batch.move_on(_run_block(work, batch))
        yield done
    progress("quantizing", len(blocks), len(blocks))


@torch.inference_mode()
def capture_first_inputs(model: PreTrainedModel, samples: torch.Tensor) -> list[Batch]:
    """What enters the first block, and what every block takes, when the model reads samples [N, L], batch by batch."""
    rows = max(1, BATCH_TOKENS // samples.shape[1])
    return [_capture_batch(model, ids.to(model.device)) for ids in samples.split(rows)]


def _capture_batch(model: PreTrainedModel, ids: torch.Tensor) -> Batch:
    blocks = find_blocks(model)[1]
    entered: list[torch.Tensor] = []
    kwargs_of_blocks: list[dict[str, Any]] = []

    def pass_through(
        hidden_states: torch.Tensor, *, past_key_values: Any = None, use_cache: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        entered.append(hidden_states)
        kwargs_of_blocks.append(kwargs)
        if len(entered) == len(blocks):
            raise _Stop
        return hidden_states

    with _blocks_replaced_by(blocks, pass_through), contextlib.suppress(_Stop):
        model(input_ids=ids, use_cache=False)
    return Batch(entered[0], kwargs_of_blocks)


@contextlib.contextmanager
def _blocks_replaced_by(blocks: torch.nn.ModuleList, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own again


def _run_block(block: torch.nn.Module, batch: Batch) -> torch.Tensor:
    output = block(batch.hidden, **batch.kwargs)
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def quantize_block(block: torch.nn.Module, name: str, batches: list[Batch], config: SolverConfig) -> QuantizedBlock:
    """Quantize a block's linear layers in the order they run; their weights are replaced in place."""
    weights: dict[str, QuantizedWeight] = {}
    losses: dict[str, float] = {}
    layers = linear_layers(block)
    for group in layers_sharing_input(block, layers, batches[0]):
        hessian = collect_hessian(block, layers[group[0]], batches, f"{name}.{group[0]}")
        for layer_name in group:
            linear, full_name = layers[layer_name], f"{name}.{layer_name}"
            solution = solve(linear.weight, hessian, config, full_name)
            weights[full_name], losses[full_name] = solution.weight, solution.relative_loss
            linear.weight.data = solution.weight.dequantize(linear.weight.dtype).to(linear.weight.device)
    return QuantizedBlock(weights, losses)


def layers_sharing_input(block: torch.nn.Module, layers: dict[str, torch.nn.Linear], batch: Batch) -> list[list[str]]:
    """Names of layers in the order they run; those that read the same tensor (q, k, v; gate, up) together."""
    groups: dict[tuple[int, int], list[str]] = {}
    kept: list[torch.Tensor] = []  # alive until the end, so that no address is used twice

    def watch(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            kept.append(args[0])
            groups.setdefault((args[0].data_ptr(), args[0].shape[-1]), []).append(name)

        return hook

    handles = [linear.register_forward_pre_hook(watch(name)) for name, linear in layers.items()]
    try:
        _run_block(block, Batch(batch.hidden[:1], [_first_row(batch.kwargs)]))
    finally:
        for handle in handles:
            handle.remove()
    return list(groups.values())


def _first_row(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Block arguments for one row: a mask has the batch's rows, rotary tables may have one for all."""
    mask = kwargs.get("attention_mask")
    return {**kwargs, "attention_mask": mask[:1]} if isinstance(mask, torch.Tensor) else kwargs


def collect_hessian(block: torch.nn.Module, linear: torch.nn.Linear, batches: list[Batch], name: str) -> torch.Tensor:
    """H of the inputs that reach one layer; each pass ends there."""
    accumulator = HessianAccumulator(linear.in_features, linear.weight.device)

    def take(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        accumulator.add(args[0])
        raise _Stop

    handle = linear.register_forward_pre_hook(take)
    try:
        for batch in batches:
            with contextlib.suppress(_Stop):
                _run_block(block, batch)
    finally:
        handle.remove()
    return accumulator.finish(name)


def _replace_weights(block: torch.nn.Module, prefix: str, weights: dict[str, QuantizedWeight]) -> None:
    layers = linear_layers(block)
    for name, weight in weights.items():
        linear = layers[name.removeprefix(prefix)]
        linear.weight.data = weight.dequantize(linear.weight.dtype).to(linear.weight.device)


@torch.inference_mode()
def quantize_head(model: PreTrainedModel, batches: list[Batch], config: SolverConfig, commits: Path) -> QuantizedBlock:
    """Quantize the head on what left the last block."""
    norm, head = find_head(model)
    commit = commits / "head.safetensors"
    if not commit.exists():
        accumulator = HessianAccumulator(head.in_features, head.weight.device)
        for batch in batches:
            accumulator.add(norm(batch.hidden))
        solution = solve(head.weight, accumulator.finish("lm_head"), config, "lm_head")
        write_commit(commit, QuantizedBlock({"lm_head": solution.weight}, {"lm_head": solution.relative_loss}))
    return read_commit(commit, config)


def write_commit(path: Path, block: QuantizedBlock) -> None:
    """One finished block, whole or not at all."""
    tensors = {f"{name}.{k}": t for name, weight in block.weights.items() for k, t in weight.pack().items()}
    tensors |= {f"{name}.loss": torch.tensor(loss, dtype=torch.float64) for name, loss in block.losses.items()}
    save_tensors(path, tensors)


def read_commit(path: Path, config: SolverConfig) -> QuantizedBlock:
    """What `write_commit` wrote."""
    tensors = load_file(path)
    weights, losses = {}, {}
    for name in [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]:
        parts = {k: tensors[f"{name}.{k}"] for k in ("qweight", "qzeros", "scales", "g_idx")}
        weights[name] = unpack_weight(name, parts, config.bits, config.group_size, zeros_offset=1)
        losses[name] = float(tensors[f"{name}.loss"])
    return QuantizedBlock(weights, losses)
