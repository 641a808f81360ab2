"""Finished blocks on disk: what a run has done already, and what the checkpoint is assembled from.

A commit is one safetensors file: each layer's packed tensors under the layer's name, and every other tensor that the
verifier holds in place of the target's or beside it. Its metadata hold, per layer, the loss and how to read the codes.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from quasar_core.checkpoint.compressed_tensors import CompressedTensorsFormat, PackedWeight, stored_tensors
from quasar_core.checkpoint.packing import QuantizedWeight, unpack_weight
from quasar_core.checkpoint.reader import open_tensors, read_tensor
from quasar_core.checkpoint.writer import save_tensors
from quasar_core.errors import QuasarError
from quasar_core.files import parse_json
from quasar_core.typed import build

_FACTS = "quasar"  # the metadata's key
Layout = Literal["gptq", "compressed-tensors"]


@dataclass(frozen=True)
class QuantizedBlock:
    """The quantized layers of one block by full name, the relative loss of each, and what else the verifier holds.

    `tensors` are named as the model names its parameters: norms that took up a smoothing, corrections, biases.
    `rounded` are experts' layers that read too little text, rounded to nearest. `layout` is how the codes are stored.
    """

    weights: dict[str, PackedWeight]
    losses: dict[str, float]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    rounded: tuple[str, ...] = ()
    layout: Layout = "gptq"

    def dense(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in] that stands in the verifier for the layer of that name."""
        return self.weights[name].dequantize(dtype)


class Width(NamedTuple):
    """How a layer's codes are stored."""

    bits: int
    group_size: int


@dataclass(frozen=True)
class CommitSummary:
    """What a report says of a block: the loss of each layer (None from another tool), those rounded, sizes.

    `own_tensors` are what the verifier holds in place of the target's beside codes, such as norms.
    """

    losses: dict[str, float | None]
    rounded: tuple[str, ...]
    widths: dict[str, Width]
    packed_weights: int
    packed_bytes: int
    own_tensors: tuple[str, ...]


@dataclass(frozen=True)
class _Layer:
    """How to read a layer's codes, and what its report says."""

    bits: int
    group_size: int
    suffixes: list[str]
    weights: int
    bytes: int
    loss: float | None


@dataclass(frozen=True)
class _Facts:
    """What a commit's metadata hold."""

    layout: Layout
    layers: dict[str, _Layer]
    rounded: list[str]


def block_file(commits: Path, index: int) -> Path:
    """The commit of a block."""
    return commits / f"block-{index:05d}.safetensors"


def head_file(commits: Path) -> Path:
    """The commit of a quantized head."""
    return commits / "head.safetensors"


def commit_files(commits: Path) -> list[Path]:
    """Every commit of a run, blocks in order, then the head."""
    head = head_file(commits)
    return [*sorted(commits.glob("block-*.safetensors")), *([head] if head.exists() else [])]


def write_commit(path: Path, block: QuantizedBlock) -> None:
    """One finished block, whole or not at all."""
    packed = {name: _pack(weight, block.layout) for name, weight in block.weights.items()}
    tensors = {f"{name}.{suffix}": tensor for name, parts in packed.items() for suffix, tensor in parts.items()}
    layers = {
        name: _Layer(
            bits=weight.bits,
            group_size=weight.group_size,
            suffixes=list(packed[name]),
            weights=weight.in_features * weight.out_features,
            bytes=sum(tensor.numel() * tensor.element_size() for tensor in packed[name].values()),
            loss=block.losses.get(name),
        )
        for name, weight in block.weights.items()
    }
    facts = _Facts(block.layout, layers, list(block.rounded))
    save_tensors(path, {**tensors, **block.tensors}, {_FACTS: json.dumps(asdict(facts))})


def read_commit(path: Path) -> QuantizedBlock:
    """What `write_commit` wrote."""
    with _opened(path) as file:
        facts, names = _facts(file, path), set(file.keys())
        weights = {}
        for name, layer in facts.layers.items():
            parts = {suffix: read_tensor(file, f"{name}.{suffix}", path) for suffix in layer.suffixes}
            weights[name] = _unpack(name, parts, layer, facts.layout)
            names -= {f"{name}.{suffix}" for suffix in parts}
        others = {name: read_tensor(file, name, path) for name in sorted(names)}
    losses = {name: layer.loss for name, layer in facts.layers.items() if layer.loss is not None}
    return QuantizedBlock(weights, losses, others, tuple(facts.rounded), facts.layout)


def read_summary(path: Path) -> CommitSummary:
    """Losses and sizes alone."""
    with _opened(path) as file:
        facts, names = _facts(file, path), set(file.keys())
    codes = {f"{name}.{suffix}" for name, layer in facts.layers.items() for suffix in layer.suffixes}
    return CommitSummary(
        {name: layer.loss for name, layer in facts.layers.items()},
        tuple(facts.rounded),
        {name: Width(layer.bits, layer.group_size) for name, layer in facts.layers.items()},
        sum(layer.weights for layer in facts.layers.values()),
        sum(layer.bytes for layer in facts.layers.values()),
        tuple(sorted(names - codes)),
    )


def committed_tensors(commits: Path) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Every tensor of every commit by name, each to be read when it is written on."""
    for path in commit_files(commits):
        with _opened(path) as file:
            names = list(file.keys())
        for name in names:
            yield name, lambda path=path, name=name: _read(path, name)  # type: ignore[misc]


def _pack(weight: PackedWeight, layout: Layout) -> dict[str, torch.Tensor]:
    """A layer's tensors as the checkpoint stores them."""
    return weight.pack() if layout == "gptq" and isinstance(weight, QuantizedWeight) else stored_tensors(weight)


def _unpack(name: str, parts: dict[str, torch.Tensor], layer: _Layer, layout: Layout) -> PackedWeight:
    if layout == "compressed-tensors":
        return CompressedTensorsFormat(layer.bits, layer.group_size).unpack(name, parts)
    return unpack_weight(name, parts, layer.bits, layer.group_size, zeros_offset=1)


def _read(path: Path, name: str) -> torch.Tensor:
    with _opened(path) as file:
        return read_tensor(file, name, path)


def _opened(path: Path) -> Any:
    try:
        return open_tensors(path)
    except QuasarError as error:
        raise QuasarError(f"{error} Delete it, and it is made anew.") from error


def _facts(file: Any, path: Path) -> _Facts:
    try:
        return build(_Facts, parse_json((file.metadata() or {}).get(_FACTS, "")))
    except ValueError as error:
        raise QuasarError(f"{path} is no finished block ({error}): delete it, and it is made anew.") from error
