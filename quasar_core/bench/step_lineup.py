"""Whose passes are timed: a stored pair or random weights of a shape, and how many bytes a pass of each must read."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from quasar_core.config import QuantizeConfig
from quasar_core.errors import QuasarError, UsageError
from quasar_core.kernels.linear import PackedLinear
from quasar_core.models import transformers_lm
from quasar_core.models.architectures import DecoderConfig
from quasar_core.models.base import CausalLM
from quasar_core.models.cpu_pass import CpuPass
from quasar_core.models.decoder import LeanDecoder
from quasar_core.models.device import choose_device, choose_dtype
from quasar_core.models.load import describe_kernels_in_use, describe_passes
from quasar_core.models.pair import Pair
from quasar_core.models.products import Product, block_products, head_product
from quasar_core.models.random_weights import random_pair, random_transformers_model
from quasar_core.models.shapes import shape_named
from quasar_core.records import Progress, no_progress

TARGET, VERIFIER, REFERENCE = "target", "verifier", "transformers"


@dataclass(frozen=True)
class Subject:
    """A model to time: what runs its products, and the bytes of weights that a pass reads."""

    model: CausalLM
    kernel: str
    weight_bytes: int


@dataclass(frozen=True)
class Lineup:
    """All models of a run, of one shape, by what they are; `all_layers` are those of the shape taken whole.

    `notes` say what was chosen, and why.
    """

    name: str
    subjects: dict[str, Subject]
    shape: DecoderConfig
    dtype: torch.dtype
    all_layers: int
    notes: Sequence[str]


@dataclass(frozen=True)
class RandomShape:
    """Random weights of a published shape: its name, how many of its layers (None: all), the verifier's codes."""

    name: str
    layers: int | None = None
    codes: QuantizeConfig = field(default_factory=QuantizeConfig)

    def config(self) -> dict[str, Any]:
        """The config.json; UsageError for a shape that is not known, or more layers than it has."""
        whole = shape_named("--shape", self.name)
        layers = whole["num_hidden_layers"] if self.layers is None else self.layers
        if not 1 <= layers <= whole["num_hidden_layers"]:
            raise UsageError(f"--layers must be from 1 to {whole['num_hidden_layers']}, not {layers}.")
        return {**whole, "num_hidden_layers": layers}


def pair_lineup(pair: Pair, reference_folder: Path | None) -> Lineup:
    """A loaded pair, and the target of a folder in transformers; QuasarError where the pair is not our decoder's."""
    target, verifier = pair.target, pair.verifier
    if not isinstance(target, LeanDecoder) or not isinstance(verifier, LeanDecoder):
        raise QuasarError(
            f"bench steps counts the bytes of our own decoder, and {pair.target_name} does not run on it."
        )
    subjects = {TARGET: lean_subject(target), VERIFIER: lean_subject(verifier)}
    if reference_folder is not None:
        reference = transformers_lm.load_target(reference_folder, pair.device, pair.dtype)
        subjects[REFERENCE] = reference_subject(reference, subjects[TARGET])
    return Lineup(pair.target_name, subjects, target.config, pair.dtype, target.config.num_layers, pair.notes)


def random_lineup(
    random: RandomShape,
    device: str = "auto",
    dtype: str = "auto",
    kernel: str = "auto",
    with_reference: bool = False,
    progress: Progress = no_progress,
) -> Lineup:
    """Random weights of a shape, in memory."""
    shape = random.config()
    config = DecoderConfig.parse(shape)
    place = choose_device(device)
    precision, reason = choose_dtype(dtype, shape["dtype"], weight_bytes(config, 2), place)
    target, verifier = random_pair(config, random.codes, place, precision, kernel, progress)
    passes = describe_passes({TARGET: target, VERIFIER: verifier}, progress)
    subjects = {TARGET: lean_subject(target), VERIFIER: lean_subject(verifier)}
    if with_reference:
        reference = random_transformers_model(shape, place, precision)
        subjects[REFERENCE] = reference_subject(reference, subjects[TARGET])
    all_layers = replace(random, layers=None).config()["num_hidden_layers"]
    notes = [
        f"dtype: {str(precision).removeprefix('torch.')}, {reason}",
        *describe_kernels_in_use(verifier.packed_layers),
        *passes,
    ]
    return Lineup(f"{random.name}, random weights", subjects, config, precision, all_layers, notes)


def lean_subject(decoder: LeanDecoder) -> Subject:
    """A target or a verifier with its kernels and bytes."""
    packed = list(decoder.packed_layers)
    kernels = dict.fromkeys(layer.choice.kernel.name for layer in packed)
    dense = "rows in C++" if isinstance(decoder.fast, CpuPass) else "torch linear"
    size = verifier_bytes(decoder.config, packed, decoder.dtype.itemsize)
    return Subject(decoder, ", ".join(kernels) or dense, size)


def reference_subject(model: CausalLM, target: Subject) -> Subject:
    """The target's weights, run by transformers."""
    return Subject(model, "transformers, not compiled", target.weight_bytes)


def weight_bytes(config: DecoderConfig, itemsize: int) -> int:
    """Weights and biases of all blocks and the head in 16 or 32 bits; norms and embedding rows are next to nothing."""
    products = (product for index in range(config.num_layers) for product in block_products(config, index).values())
    return itemsize * sum(_elements(product) for product in (*products, head_product(config)))


def _elements(product: Product) -> int:
    rows = sum(product.rows)
    return rows * product.columns + (rows if product.bias else 0)


def packed_bytes(in_features: int, out_features: int, bits: int, group_size: int) -> int:
    """Codes, float16 scales and packed zeros of a layer, whatever its kernel makes of them."""
    groups = 1 if group_size == -1 else -(-in_features // group_size)
    return out_features * (in_features * bits + groups * (16 + bits)) // 8


def verifier_bytes(config: DecoderConfig, packed: Sequence[PackedLinear], itemsize: int) -> int:
    """Packed layers by their codes, the rest as the target has it."""
    saved = sum(
        itemsize * layer.in_features * layer.out_features
        - packed_bytes(layer.in_features, layer.out_features, layer.bits, layer.group_size)
        for layer in packed
    )
    return weight_bytes(config, itemsize) - saved


def cache_bytes(config: DecoderConfig, positions: int, itemsize: int) -> int:
    """Keys and values of these positions in all layers; a sliding window reads no more than its own."""
    seen = sum(min(positions, window or positions) for window in config.windows)
    return 2 * seen * config.num_kv_heads * config.head_size * itemsize
