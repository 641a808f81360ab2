"""Mixtures of experts: transformers holds all experts' weights as one tensor; here every expert has layers of its own.

Layers of their own can be watched, quantized and replaced one by one. Letters: E experts, H hidden, I intermediate.
"""

import re
from typing import Any

import torch

_MODULES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_EXPERT = re.compile(r"(\.experts\.\d+\.)(\w+)")


class Expert(torch.nn.Module):
    """One gated MLP. Its two input layers come before the output layer, in the order they run."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(down)


class SeparateExperts(torch.nn.ModuleList):
    """In the place of transformers' fused experts: the same function of the same arguments."""

    def __init__(self, experts: list[Expert], act_fn: torch.nn.Module) -> None:
        super().__init__(experts)
        self.act_fn = act_fn

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Tokens [T, H], the experts of each [T, k] and their shares [T, k] → [T, H]."""
        output = torch.zeros_like(hidden_states)
        experts = list(self.experts())
        for index in top_k_index.unique().tolist():
            if index < len(experts):  # a number beyond them stands for no expert
                expert = experts[index]
                token, place = torch.where(top_k_index == index)
                states = hidden_states[token]
                states = expert.down_proj(self.act_fn(expert.gate_proj(states)) * expert.up_proj(states))
                output.index_add_(0, token, (states * top_k_weights[token, place, None]).to(output.dtype))
        return output

    def experts(self) -> list[Expert]:
        """The experts in order."""
        return [module for module in self if isinstance(module, Expert)]


def separate_experts(module: torch.nn.Module) -> None:
    """Give every expert inside the module layers of its own, which are views of the fused weights."""
    for name, child in list(module.named_children()):
        if is_fused(child):
            setattr(module, name, _separated(child))
        else:
            separate_experts(child)


def is_fused(module: torch.nn.Module) -> bool:
    """Whether the module is E gated MLPs in two tensors [E, 2·I, H] and [E, H, I], gates first, without biases."""
    parameters = dict(module.named_parameters(recurse=False))
    if parameters.keys() != {"gate_up_proj", "down_proj"} or not hasattr(module, "act_fn"):
        return False
    if getattr(module, "is_transposed", False) or not getattr(module, "is_concatenated", True):
        return False
    gate = getattr(type(module), "_apply_gate", None)
    return gate is None or gate.__name__ == "_default_apply_gate"


def module_name(name: str) -> str:
    """The model's name of a layer in the files; Mixtral's and LFM2's files have names of their own."""
    name = name.replace(".block_sparse_moe.", ".mlp.")
    return _EXPERT.sub(lambda found: found[1] + _MODULES.get(found[2], found[2]), name)


def _separated(fused: Any) -> SeparateExperts:
    intermediate = fused.gate_up_proj.shape[1] // 2
    experts = [
        Expert(gate_up[:intermediate], gate_up[intermediate:], down)
        for gate_up, down in zip(fused.gate_up_proj.data, fused.down_proj.data, strict=True)
    ]
    return SeparateExperts(experts, fused.act_fn)


def _linear(weight: torch.Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return linear
