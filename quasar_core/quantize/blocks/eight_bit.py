"""Quantize blocks to W8A8 and fp8: smooth a layer's activations, then round its weights to 8 bits.

Smoothing divides the weights before a layer, where nothing else reads their outputs: the norm before q, k and v, the
norm before gate and up, and the outputs of up before down. The norms are the verifier's own from then on.
Queries, keys and values keep their size, since target and verifier share one cache; so o_proj is not smoothed.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quasar_core.config import QuantizeConfig
from quasar_core.models.config.decoder import DecoderConfig, why_not_lean
from quasar_core.quantize.blocks.activations import Activations, run_block
from quasar_core.quantize.blocks.layerwise import Preparation, replace_weight
from quasar_core.quantize.blocks.streaming import linear_layers
from quasar_core.quantize.solve.eight_bit import (
    E4M3Format,
    EightBitFormat,
    InputSample,
    Int8Format,
    fold_into_norm,
    round_to_nearest,
    search_smoothing,
    solve_eight_bits,
)
from quasar_core.quantize.solve.gptq import Solution, SolverConfig
from quasar_core.store.model_config import read_text_config

SAMPLED_ROWS = 512  # of the calibration text, for the search
# The norm that is divided by the factors, and the layers that read it, by the architecture table's names.
NORM_FOLDS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
)
LAYER_FOLD = ("mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class EightBitMethod:
    """A `layerwise.Prepare`. `smooth` only where the block is one of the architecture table's; `solved` by GPTQ."""

    number_format: EightBitFormat
    smooth: bool
    solved: bool = True

    def __call__(self, block: torch.nn.Module, name: str, activations: Activations) -> Preparation:
        """Smooth a block in place; how its layers are to be rounded then."""
        smoothed = _Smoothed(block, name, self.number_format, activations) if self.smooth else None
        exact = smoothed.full_weights() if smoothed else {}

        def solve(
            weights: Mapping[str, torch.Tensor],
            hessian: torch.Tensor,
            configs: Mapping[str, SolverConfig],
            correlations: MutableMapping[str, torch.Tensor] | None = None,
        ) -> dict[str, Solution]:
            weights = {layer: exact.get(layer, weight) for layer, weight in weights.items()}
            if self.solved:
                return solve_eight_bits(self.number_format, weights, hessian, configs, correlations)
            return round_to_nearest(self.number_format, weights, hessian)

        return Preparation(solve, smoothed.tensors if smoothed else {}, "compressed-tensors")


def eight_bit_method(config: QuantizeConfig, source: Path) -> EightBitMethod | None:
    """What `--method` asks for of the model in a folder; None for GPTQ."""
    if config.method == "gptq":
        return None
    content = read_text_config(source)
    known = why_not_lean(content) is None and DecoderConfig.parse(content).can_be_smoothed
    number_format = Int8Format() if config.method == "w8a8" else E4M3Format()
    return EightBitMethod(number_format, smooth=known, solved=config.rounding == "gptq")


def kernel_of_method(config: QuantizeConfig) -> str:
    """The kernel that fidelity is measured with: the one whose activations are rounded as the method has it."""
    return {"gptq": "dense", "w8a8": "int8", "fp8": "float8"}[config.method]


class _Smoothed:
    """A block that computes what it did, by other norms and weights.

    The weights of its layers are kept in float32 beside those that the block now holds, rounded to its dtype.
    """

    def __init__(
        self, block: torch.nn.Module, name: str, number_format: EightBitFormat, activations: Activations
    ) -> None:
        self.block, self.name, self.number_format = block, name, number_format
        self.layers = linear_layers(block)
        readers = [*(readers for _, readers in NORM_FOLDS), LAYER_FOLD[1:]]
        self.weights = {layer: self.layers[layer].weight.float() for group in readers for layer in group}
        self.tensors: dict[str, torch.Tensor] = {}
        samples = sample_inputs(block, [self.layers[group[0]] for group in readers], activations)
        for (norm, layers), sample in zip(NORM_FOLDS, samples[:-1], strict=True):
            self._smooth_norm(norm, layers, sample)
        self._smooth_layer(*LAYER_FOLD, samples[-1])
        for layer, weight in self.weights.items():
            replace_weight(self.layers[layer], weight)

    def full_weights(self) -> dict[str, torch.Tensor]:
        """The weights in float32, by the layers' full names."""
        return {f"{self.name}.{layer}": weight for layer, weight in self.weights.items()}

    def _smooth_norm(self, norm: str, readers: Sequence[str], sample: InputSample) -> None:
        """Divide the norm's weight by the factors, multiply the columns of its readers."""
        factors = search_smoothing(sample, [self.weights[reader] for reader in readers], self.number_format).factors
        folded, factors = fold_into_norm(self.block.get_parameter(f"{norm}.weight").detach(), factors)
        self._put(f"{norm}.weight", folded)
        for reader in readers:
            self.weights[reader] = self.weights[reader] * factors

    def _smooth_layer(self, before: str, reader: str, sample: InputSample) -> None:
        """Divide the outputs of the layer before by the factors, multiply the columns of its reader."""
        factors = search_smoothing(sample, [self.weights[reader]], self.number_format).factors
        self.weights[before] = self.weights[before] / factors[:, None]
        bias = self.layers[before].bias
        if bias is not None:
            self._put(f"{before}.bias", (bias.detach().float() / factors).to(bias.dtype))
        self.weights[reader] = self.weights[reader] * factors

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        """A parameter of the verifier's own, in the block too."""
        self.block.get_parameter(name).data = tensor
        self.tensors[f"{self.name}.{name}"] = tensor


def sample_inputs(
    block: torch.nn.Module, layers: Sequence[torch.nn.Linear], activations: Activations
) -> list[InputSample]:
    """Collect each layer's largest activations, and rows spread over the whole text."""
    stride = max(1, activations.hidden.shape[0] * activations.hidden.shape[1] // SAMPLED_ROWS)
    samples = [InputSample(torch.zeros(layer.in_features), torch.empty(0, layer.in_features)) for layer in layers]

    def take(sample: InputSample, inputs: torch.Tensor) -> None:
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        sample.largest = torch.maximum(sample.largest.to(rows), rows.abs().amax(dim=0))
        sample.rows = torch.cat([sample.rows.to(rows), rows[::stride]])

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
