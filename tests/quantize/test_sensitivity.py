"""What each width of each layer costs: against a whole model in which that layer alone is quantized."""

from dataclasses import replace

import pytest
import torch
from helpers.tiny_models import random_model
from transformers import PreTrainedModel

from quasar_core.quantize.blocks.activations import capture_first_inputs
from quasar_core.quantize.fidelity import kl_divergence
from quasar_core.quantize.mixed_precision import MEASURED_BITS, measure_widths, possible_widths
from quasar_core.quantize.solve.gptq import SolverConfig, solve
from quasar_core.quantize.solve.hessian import shrunk
from tools.study.study import with_weights


def test_a_width_costs_less_the_more_bits_it_has_and_alone_is_measured() -> None:
    model = random_model("llama").model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = torch.randint(97, (4, 32), generator=torch.Generator().manual_seed(0))
    groups = measure_widths(model, capture_first_inputs(model, rows), SolverConfig(group_size=32))
    assert [len(group.names) for group in groups] == [3, 1, 2, 1] * 2
    assert groups[0].names[0] == "model.layers.0.self_attn.q_proj"
    for found in groups:
        costs = {choice.bits: choice.cost for choice in found.choices}
        assert costs[2] > costs[4] > costs[8] > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("group_size", "fine"), [(128, [(3, 64), (3, 32), (4, 64), (4, 32)]), (64, [(3, 32), (4, 32)]), (32, [])]
)
def test_smaller_groups_are_steps_between_two_widths(group_size: int, fine: list[tuple[int, int]]) -> None:
    """And 3 bits need a multiple of 32 inputs and outputs."""
    widths = possible_widths(SolverConfig(group_size=group_size), [torch.nn.Linear(128, 64), torch.nn.Linear(128, 32)])
    usual = [(bits, group_size) for bits in (2, 3, 4, 8)]
    assert [(width.bits, width.group_size) for width in widths] == usual + fine
    narrow = possible_widths(SolverConfig(group_size=group_size), [torch.nn.Linear(128, 64), torch.nn.Linear(128, 16)])
    assert [(width.bits, width.group_size) for width in narrow] == [pair for pair in usual + fine if pair[0] != 3]


@torch.no_grad()
def divergence_alone(model: PreTrainedModel, rows: torch.Tensor, weights: dict[str, torch.Tensor]) -> float:
    """Mean KL of the whole model with these weights in place of its own."""
    changed = with_weights(model, weights)
    return kl_divergence(model(rows).logits.flatten(0, 1), changed(rows).logits.flatten(0, 1)).double().mean().item()


@torch.no_grad()
def test_what_a_width_costs_is_what_a_model_diverges_with_that_layer_alone_quantized() -> None:
    """Exactly at the width that is measured; nearly at the others, whose costs follow from their losses."""
    model = random_model("llama").model
    rows = torch.randint(97, (8, 32), generator=torch.Generator().manual_seed(0))
    default = SolverConfig(group_size=32, sweeps=0)
    found = measure_widths(model, capture_first_inputs(model, rows), default)[-1]
    down = found.names[0]
    inputs: list[torch.Tensor] = []
    handle = model.get_submodule(down).register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    model(rows)
    handle.remove()
    hessian = shrunk(2 * inputs[0].t() @ inputs[0] / len(inputs[0]), len(inputs[0]))
    measured = next(choice for choice in found.choices if choice.bits >= MEASURED_BITS)
    for choice in found.choices:
        config = replace(default, bits=choice.bits, group_size=choice.group_size)
        dense = solve(model.get_submodule(down).weight, hessian, config, down).weight.dequantize()
        actual = divergence_alone(model, rows, {down: dense})
        assert choice.cost == pytest.approx(actual, rel=1e-3 if choice == measured else 0.3)
