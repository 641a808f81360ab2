"""Commits: the blocks that a run has finished.

A commit is one safetensors file of a finished block, in the names of the target's files: each layer's packed tensors,
and every other tensor that the verifier has in place of the target's. Its metadata hold, per layer, the loss and how to
read the codes. So it is a shard of the checkpoint: one of `SHARD_BYTES` and more is not written a second time.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from quasar_core.checkpoint.compressed_tensors import CompressedTensorsFormat, PackedWeight, stored_tensors
from quasar_core.checkpoint.gptq_format import QuantizedWeight, unpack_weight
from quasar_core.checkpoint.tensor_files import open_tensors, read_tensor
from quasar_core.checkpoint.writer import save_tensors
from quasar_core.errors import QuasarError
from quasar_core.files import parse_json
from quasar_core.quantize.kept_text import check_sum
from quasar_core.typed import build

SHARD_BYTES = 32_000_000  # smaller blocks share a shard, so that a small model is one file
_FACTS = "quasar"  # the metadata's key
Layout = Literal["gptq", "compressed-tensors"]


@dataclass(frozen=True)
class QuantizedBlock:
    """The quantized layers of one block by full name, the relative loss of each, and what else the verifier holds.

    `tensors` are named as the model names its parameters: smoothed norms and biases.
    `rounded` are experts' layers with too few samples, rounded to nearest. `layout` is how the codes are stored.
    """

    weights: dict[str, PackedWeight]
    losses: dict[str, float]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    rounded: tuple[str, ...] = ()
    layout: Layout = "gptq"

    def dense(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight [out, in] that stands in the verifier for the layer of that name."""
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
    """How to read a layer's codes, and what its report says; `stored` is its name in the file."""

    stored: str
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
    others: dict[str, str]  # the names in the file of the block's other tensors, by their own
    crc32: int | None = None  # of the tensors; commits of older versions have none


def block_file(commits: Path, index: int) -> Path:
    """Name the commit of a block."""
    return commits / f"block-{index:05d}.safetensors"


def head_file(commits: Path) -> Path:
    """Name the commit of a quantized head."""
    return commits / "head.safetensors"


def commit_files(commits: Path) -> list[Path]:
    """List every commit of a run, blocks in order, then the head."""
    head = head_file(commits)
    return [*sorted(commits.glob("block-*.safetensors")), *([head] if head.exists() else [])]


def is_shard(commit: Path) -> bool:
    """Tell whether a commit is a shard of its own."""
    return commit.stat().st_size >= SHARD_BYTES


def own_name(name: str) -> str:
    """Name a tensor in a file as the model does."""
    return name


def write_commit(path: Path, block: QuantizedBlock, stored: Callable[[str], str] = own_name) -> None:
    """Write a finished block, whole or not at all; `stored` gives the name that the target's files have for another."""
    packed = {name: _pack(weight, block.layout) for name, weight in block.weights.items()}
    tensors = {f"{stored(name)}.{suffix}": tensor for name, parts in packed.items() for suffix, tensor in parts.items()}
    layers = {
        name: _Layer(
            stored=stored(name),
            bits=weight.bits,
            group_size=weight.group_size,
            suffixes=list(packed[name]),
            weights=weight.in_features * weight.out_features,
            bytes=sum(tensor.numel() * tensor.element_size() for tensor in packed[name].values()),
            loss=block.losses.get(name),
        )
        for name, weight in block.weights.items()
    }
    others = {name: stored(name) for name in block.tensors}
    tensors |= {others[name]: tensor for name, tensor in block.tensors.items()}
    facts = _Facts(block.layout, layers, list(block.rounded), others, check_sum(tensors))
    save_tensors(path, tensors, {_FACTS: json.dumps(asdict(facts))})


def read_commit(path: Path) -> QuantizedBlock:
    """Read what `write_commit` wrote; QuasarError where it was damaged since."""
    with _opened(path) as file:
        facts = _facts(file, path)
        names = [f"{layer.stored}.{suffix}" for layer in facts.layers.values() for suffix in layer.suffixes]
        tensors = {name: read_tensor(file, name, path) for name in (*names, *facts.others.values())}
    if facts.crc32 is not None and facts.crc32 != check_sum(tensors):
        raise QuasarError(f"{path} is not what was written: delete it, and it is made anew.")
    weights = {}
    for name, layer in facts.layers.items():
        parts = {suffix: tensors[f"{layer.stored}.{suffix}"] for suffix in layer.suffixes}
        weights[name] = _unpack(name, parts, layer, facts.layout)
    others = {name: tensors[stored] for name, stored in facts.others.items()}
    losses = {name: layer.loss for name, layer in facts.layers.items() if layer.loss is not None}
    return QuantizedBlock(weights, losses, others, tuple(facts.rounded), facts.layout)


def read_summary(path: Path) -> CommitSummary:
    """Read losses and sizes alone."""
    with _opened(path) as file:
        facts = _facts(file, path)
    return CommitSummary(
        {name: layer.loss for name, layer in facts.layers.items()},
        tuple(facts.rounded),
        {name: Width(layer.bits, layer.group_size) for name, layer in facts.layers.items()},
        sum(layer.weights for layer in facts.layers.values()),
        sum(layer.bytes for layer in facts.layers.values()),
        tuple(facts.others),
    )


def tensor_names(commit: Path) -> list[str]:
    """List the names of a commit's tensors."""
    with _opened(commit) as file:
        return list(file.keys())


def committed_tensors(commit: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Read every tensor of a commit, one after the other."""
    with _opened(commit) as file:
        for name in file.keys():  # noqa: SIM118
            yield name, read_tensor(file, name, commit)


def _pack(weight: PackedWeight, layout: Layout) -> dict[str, torch.Tensor]:
    """Lay a layer's tensors out as the checkpoint stores them."""
    return weight.pack() if layout == "gptq" and isinstance(weight, QuantizedWeight) else stored_tensors(weight)


def _unpack(name: str, parts: dict[str, torch.Tensor], layer: _Layer, layout: Layout) -> PackedWeight:
    if layout == "compressed-tensors":
        return CompressedTensorsFormat(layer.bits, layer.group_size).unpack(name, parts)
    return unpack_weight(name, parts, layer.bits, layer.group_size, zeros_offset=1)


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
