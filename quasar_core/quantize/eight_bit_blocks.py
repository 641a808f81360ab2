"""W8A8 and fp8, block after block: smooth what feeds a layer, then round its weights to nearest.

Smoothing is taken up by what stands before a layer, where nothing else reads it: the norm in front of q, k and v, the
norm in front of gate and up, and the outputs of up in front of down. The norms are the verifier's own from then on.
Queries, keys and values keep their size, since target and verifier share one cache; so o_proj is not smoothed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quasar_core.checkpoint.reader import read_json
from quasar_core.config import QuantizeConfig
from quasar_core.models.architectures import why_not_lean
from quasar_core.quantize.activations import Activations, run_block
from quasar_core.quantize.blocks import linear_layers
from quasar_core.quantize.commits import QuantizedBlock
from quasar_core.quantize.eight_bit import Floats, Integers, Number
from quasar_core.quantize.layer_plan import LayerPlan
from quasar_core.quantize.layerwise import replace_weights, stages
from quasar_core.quantize.smoothing import InputSample, fold_into_norm, search_smoothing

SAMPLED_ROWS = 512  # of the calibration text, for the search and for the losses
# What takes up the factors, and the layers that read it, by their names in a block of the architecture table.
NORM_FOLDS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
)
LAYER_FOLD = ("mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class EightBitMethod:
    """A `BlockMethod`; `smooth` only where the block is one of the architecture table's."""

    number: Number
    smooth: bool

    def __call__(self, block: torch.nn.Module, name: str, activations: Activations, plan: LayerPlan) -> QuantizedBlock:
        """Round a block's linear layers; weights and norms are replaced in place."""
        work = _Work(block, name, self.number, activations)
        if self.smooth:
            for norm, readers in NORM_FOLDS:
                work.smooth_norm(norm, readers)
            work.smooth_layer(*LAYER_FOLD)
        done = work.round()
        replace_weights(block, name, done)
        return done


def eight_bit_method(config: QuantizeConfig, source: Path) -> EightBitMethod | None:
    """What `--method` asks for of the model in a folder; None for GPTQ."""
    if config.method == "gptq":
        return None
    known = why_not_lean(read_json(source / "config.json")) is None
    return EightBitMethod(Integers() if config.method == "w8a8" else Floats(), smooth=known)


def kernel_of_method(config: QuantizeConfig) -> str:
    """The kernel that fidelity is measured with: the one whose activations are rounded as the method has it."""
    return {"gptq": "dense", "w8a8": "int8", "fp8": "float8"}[config.method]


class _Work:
    """A block on its way: weights in float32 as smoothing leaves them, samples of what enters each layer."""

    def __init__(self, block: torch.nn.Module, name: str, number: Number, activations: Activations) -> None:
        self.block, self.name, self.number = block, name, number
        self.layers = linear_layers(block)
        self.weights = {layer: linear.weight.float() for layer, linear in self.layers.items()}
        self.tensors: dict[str, torch.Tensor] = {}
        groups = [group for stage in stages(block, self.layers, activations) for group in stage.groups]
        samples = sample_inputs(block, [self.layers[group[0]] for group in groups], activations)
        self.samples = {layer: sample for group, sample in zip(groups, samples, strict=True) for layer in group}

    def smooth_norm(self, norm: str, readers: Sequence[str]) -> None:
        """Divide the norm's weight by the factors, multiply the columns of its readers."""
        weight = self.block.get_parameter(f"{norm}.weight")
        factors = self._search(readers)
        self.tensors[f"{self.name}.{norm}.weight"], factors = fold_into_norm(weight.detach(), factors)
        self._take_up(readers, factors)

    def smooth_layer(self, before: str, reader: str) -> None:
        """Divide the outputs of the layer before by the factors, multiply the columns of its reader."""
        factors = self._search([reader])
        self.weights[before] = self.weights[before] / factors[:, None]
        bias = self.layers[before].bias
        if bias is not None:
            self.tensors[f"{self.name}.{before}.bias"] = (bias.detach().float() / factors).to(bias.dtype)
        self._take_up([reader], factors)

    def round(self) -> QuantizedBlock:
        """Every layer in 8 bits, with the loss that is left in its outputs."""
        rounded = {layer: self.number.round_weight(weight) for layer, weight in self.weights.items()}
        losses = {}
        for layer, weight in rounded.items():
            rows = self.samples[layer].rows
            output = rows @ self.weights[layer].t()
            error = self.number.round_rows(rows) @ weight.dequantize().to(rows).t() - output
            losses[layer] = (error.square().sum() / output.square().sum().clamp_min(1e-30)).item()
        return QuantizedBlock(
            {f"{self.name}.{layer}": weight for layer, weight in rounded.items()},
            {f"{self.name}.{layer}": loss for layer, loss in losses.items()},
            self.tensors,
            layout="compressed-tensors",
        )

    def _search(self, readers: Sequence[str]) -> torch.Tensor:
        return search_smoothing(self.samples[readers[0]], [self.weights[r] for r in readers], self.number).factors

    def _take_up(self, readers: Sequence[str], factors: torch.Tensor) -> None:
        self.samples[readers[0]].rows /= factors  # one sample for all of them
        for reader in readers:
            self.weights[reader] = self.weights[reader] * factors


def sample_inputs(
    block: torch.nn.Module, layers: Sequence[torch.nn.Linear], activations: Activations
) -> list[InputSample]:
    """The largest magnitudes of what enters each layer, and rows spread over the whole text."""
    stride = max(1, activations.hidden.shape[0] * activations.hidden.shape[1] // SAMPLED_ROWS)
    samples = [_nothing_seen(layer) for layer in layers]

    def take(sample: InputSample, inputs: torch.Tensor) -> None:
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        if len(rows):
            sample.largest = torch.maximum(sample.largest, rows.abs().amax(dim=0))
            sample.rows = torch.cat([sample.rows, rows[::stride]])

    handles = [
        layer.register_forward_pre_hook(lambda _, args, sample=sample: take(sample, args[0]))
        for layer, sample in zip(layers, samples, strict=True)
    ]
    try:
        for batch in activations.batches():
            run_block(block, batch)
    finally:
        for handle in handles:
            handle.remove()
    return samples


def _nothing_seen(layer: torch.nn.Linear) -> InputSample:
    """Of a layer that no text has reached, such as an expert."""
    device = layer.weight.device
    return InputSample(torch.zeros(layer.in_features, device=device), torch.empty(0, layer.in_features, device=device))
