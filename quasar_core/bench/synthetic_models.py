"""Models of a given shape with random weights, made in memory: their passes cost what those of real ones cost.

The sources here stand where a folder's files stand, so that random models are built exactly as stored ones are.
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quasar_core.checkpoint.compressed_tensors import FLOAT8, Float8Weight, PackedWeight
from quasar_core.checkpoint.gptq_format import QuantizedWeight, count_groups, trivial_groups
from quasar_core.checkpoint.reader import CPU, VerifierCheckpoint
from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.config import QuantizeConfig
from quasar_core.errors import UsageError
from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.decoder.linear import all_block_products, head_product, stored_shapes
from quasar_core.models.hf.causal_lm import TransformersLM
from quasar_core.models.weights.lean_weights import attach_verifier, build_target
from quasar_core.records import Progress, no_progress

POOL = 10_000_019  # a prime, so that no two rows of a matrix are the same
LARGEST = 0.05
_BELOW_2 = 0xBF  # the bits of an e4m3 number that keep it finite and small


class Pool:
    """A pool of random values that every tensor takes its own stretch of: filling billions takes seconds."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values, self._start = values, 0

    def take(self, *shape: int) -> torch.Tensor:
        """A tensor of this shape, which begins where the last one ended."""
        count, size = int(torch.Size(shape).numel()), self._values.numel()
        first = self._values[self._start : self._start + count]
        times, rest = divmod(count - len(first), size)
        self._start = (self._start + count) % size
        return torch.cat([first, *[self._values] * times, self._values[:rest]]).view(shape)


@lru_cache(maxsize=1)
def _random_values(size: int, dtype: torch.dtype) -> torch.Tensor:
    """The pool of weights, which no one writes to: a choice among verifiers asks for it for each of them."""
    return torch.empty(size).uniform_(-LARGEST, LARGEST, generator=torch.Generator().manual_seed(0)).to(dtype)


@lru_cache(maxsize=1)
def _random_bytes(size: int) -> torch.Tensor:
    """The pool of codes."""
    return torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


class RandomTensors(TensorFiles):
    """Every tensor that a model of this shape stores; norms are near 1."""

    def __init__(self, config: DecoderConfig, dtype: torch.dtype, progress: Progress = no_progress) -> None:
        self.folder = Path("random weights")
        self._shapes = stored_shapes(config)
        self._progress = progress
        self._pool = Pool(_random_values(POOL, dtype))

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._shapes[name]

    def load(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU; another one each time."""
        values = self._pool.take(*self._shapes[name])
        return values + 1 if "norm" in name else values

    def load_many(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors one by one."""
        for done, name in enumerate(names):
            self._progress("making random weights", done, len(names))
            yield name, self.load(name)
        self._progress("making random weights", len(names), len(names))


class RandomCheckpoint(VerifierCheckpoint):
    """Random codes for every linear layer, in the bits and groups asked for; a head of 16 bits has none.

    `widths` are the bits and group sizes of layers that have their own, by name.
    """

    own_norms = False

    def __init__(
        self,
        config: DecoderConfig,
        codes: QuantizeConfig,
        dtype: torch.dtype,
        progress: Progress = no_progress,
        widths: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        self.folder = Path("random codes")
        self.tensors = RandomTensors(config, dtype)
        self._codes, self._progress, self._done = codes, progress, 0
        self._widths = widths or {}
        head = [head_product(config)] if codes.lm_head_bits < 16 else []
        products = [*all_block_products(config), *head]
        self._parts = {name: product.part(i) for product in products for i, name in enumerate(product.names)}
        self._stored_parts = {name: (name,) for name in self._parts}
        self._pool = Pool(_random_bytes(POOL))

    def layer(self, name: str, device: torch.device = CPU) -> PackedWeight:
        """One layer's codes, on the CPU."""
        self._done += 1
        self._progress("making random codes", self._done, len(self._parts))
        usual = self._codes.lm_head_bits if name == "lm_head" else self._codes.bits
        bits, size = self._widths.get(name, (usual, self._codes.groups_of))
        (rows,), columns = self._parts[name].rows, self._parts[name].columns
        if self._codes.method == "fp8":
            values = (self._pool.take(rows, columns) & _BELOW_2).view(FLOAT8)
            return Float8Weight(values, torch.full((rows,), LARGEST / 2))
        groups, middle = (count_groups(columns, size), rows), 2 ** (bits - 1)
        return QuantizedWeight(
            bits,
            size,
            codes=self._pool.take(columns, rows) >> (8 - bits),
            scales=torch.full(groups, LARGEST / middle, dtype=torch.float16),
            zeros=torch.full(groups, middle, dtype=torch.int32),
            g_idx=trivial_groups(columns, size),
        )


def random_pair(
    config: DecoderConfig,
    codes: QuantizeConfig,
    device: torch.device,
    dtype: torch.dtype,
    kernel: str = "auto",
    progress: Progress = no_progress,
) -> tuple[LeanDecoder, LeanDecoder]:
    """Target and verifier of one shape; the verifier is no copy of the target, only as large as one."""
    target = build_target(config, RandomTensors(config, dtype, progress), device, dtype)
    return target, attach_verifier(target, RandomCheckpoint(config, codes, dtype, progress), kernel)


def random_transformers_model(shape: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> TransformersLM:
    """A model of the shape in transformers, with its own initial weights; UsageError where it knows no such model."""
    options = {key: value for key, value in shape.items() if key not in ("model_type", "dtype")}
    try:
        config = AutoConfig.for_model(shape["model_type"], **options)
    except ValueError as error:
        raise UsageError(f"--reference transformers: transformers has no {shape['model_type']}.") from error
    with device:  # billions of random numbers: made where they are used
        return TransformersLM(AutoModelForCausalLM.from_config(config, dtype=dtype))
