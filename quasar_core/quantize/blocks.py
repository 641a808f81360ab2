"""Where a model's decoder blocks, final norm and head are, and which layers of a block are quantized."""

import torch
from transformers import PreTrainedModel

from quasar_core.checkpoint.packing import why_not_packable
from quasar_core.errors import QuasarError
from quasar_core.quantize.layer_plan import HEAD, LayerPlan


def find_blocks(model: PreTrainedModel) -> tuple[str, torch.nn.ModuleList]:
    """The list of decoder blocks and its name, such as `model.layers`; a vision tower has another of its own."""
    count = model.config.get_text_config().num_hidden_layers
    inside = set(map(id, model.get_decoder().modules()))
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    for name, module in lists:
        if len(module) == count and id(module) in inside:
            return name, module
    raise QuasarError(f"No list of {count} decoder blocks was found in {type(model).__name__}.")


def find_head(model: PreTrainedModel) -> tuple[torch.nn.Module, torch.nn.Linear]:
    """The final norm and the head that reads it."""
    norm, head = getattr(model.base_model, "norm", None), getattr(model, "lm_head", None)
    if norm is None or not isinstance(head, torch.nn.Linear):
        raise QuasarError(f"--lm-head-bits: {type(model).__name__} has no final norm and lm_head to quantize.")
    return norm, head


def linear_layers(module: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linear layers inside a module by their name within it."""
    return {name: child for name, child in module.named_modules() if isinstance(child, torch.nn.Linear)}


def quantized_layers(model: PreTrainedModel, plan: LayerPlan) -> dict[str, torch.nn.Linear]:
    """Every layer that gets codes, by full name; refused, before any work, where the format cannot hold one."""
    prefix, blocks = find_blocks(model)
    layers = {f"{prefix}.{name}": linear for name, linear in linear_layers(blocks).items()}
    head = {HEAD: find_head(model)[1]} if plan.quantizes_head else {}
    if not layers:
        raise QuasarError(f"{type(model).__name__} has no linear layers in its blocks: there is nothing to quantize.")
    for name, parameter in blocks.named_parameters():
        if parameter.dim() == 3 and min(parameter.shape) > 1:
            raise QuasarError(f"{prefix}.{name} holds experts in a form that this version does not quantize.")
    layers |= head
    for name, linear in layers.items():
        obstacle = why_not_packable(linear.in_features, linear.out_features, plan.solver(name).bits)
        if obstacle:
            raise QuasarError(f"Layer {name} cannot be packed: {obstacle}.")
    return layers
