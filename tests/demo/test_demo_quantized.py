"""GPTQ against rounding to nearest on the demo model's own text: what quantizing is for."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import quasar_core.demo
from quasar_core.checkpoint.gptq_format import trivial_groups
from quasar_core.quantize.blocks.activations import capture_first_inputs
from quasar_core.quantize.blocks.layerwise import quantize_blocks
from quasar_core.quantize.blocks.streaming import find_blocks, linear_layers
from quasar_core.quantize.fidelity import kl_divergence
from quasar_core.quantize.self_text import write_self_text
from quasar_core.quantize.solve.gptq import SolverConfig
from quasar_core.quantize.solve.grid import fit_grid, round_to_nearest
from quasar_core.quantize.text_writers import TransformersWriter

FOLDER = Path(quasar_core.demo.__file__).parent / "model"
SAMPLES, HELD_OUT, LENGTH = 32, 16, 128


def rounded_to_nearest(model: PreTrainedModel) -> PreTrainedModel:
    """Every linear layer of the blocks at 4 bits in groups of 128, symmetric, scales from the largest weight."""
    rounded = copy.deepcopy(model)
    for block in find_blocks(rounded)[1]:
        for linear in linear_layers(block).values():
            grid = fit_grid(linear.weight.data, 4, 128, sym=True, search=False)
            groups = trivial_groups(linear.in_features, 128).long()
            codes = round_to_nearest(linear.weight.data, grid, groups)
            linear.weight.data = grid.scales[:, groups] * (codes - grid.zeros[:, groups])
    return rounded


def quantized(model: PreTrainedModel, samples: torch.Tensor, commits: Path) -> PreTrainedModel:
    """The same by the solver, with the options that `quasar quantize` takes by default."""
    solved = copy.deepcopy(model)
    batches = capture_first_inputs(model, samples)
    for block in quantize_blocks(model, batches, SolverConfig(), commits):
        for name, weight in block.weights.items():
            solved.get_submodule(name).weight.data = weight.dequantize()
    return solved


def divergence_from(model: PreTrainedModel, rows: torch.Tensor) -> Callable[[PreTrainedModel], float]:
    """Mean KL in nats of another model to this one on the rows."""
    expected = model(input_ids=rows).logits.flatten(0, 1)
    return lambda other: kl_divergence(expected, other(input_ids=rows).logits.flatten(0, 1)).mean().item()


@torch.no_grad()
def test_gptq_at_least_halves_the_divergence_of_rounding_to_nearest(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    text = write_self_text(
        TransformersWriter(model), AutoTokenizer.from_pretrained(FOLDER), SAMPLES + HELD_OUT, LENGTH, seed=0
    ).tokens
    divergence = divergence_from(model, text[SAMPLES:])
    solved, nearest = quantized(model, text[:SAMPLES], tmp_path), rounded_to_nearest(model)
    assert divergence(model) == 0
    assert 0 < divergence(solved) <= 0.5 * divergence(nearest)
