"""A checkpoint's tensors and config under GPTQModel's names (`gptqmodel_names.py`), a block at a time.

Codes are cut and renamed, never computed anew; of layers that GPTQModel has in 16 bits the weights that the codes stand
for are written, in float16 as it computes them itself.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quasar_core.checkpoint.formats import GptqFormat
from quasar_core.checkpoint.fused_names import dynamic_rules, listed_layers
from quasar_core.checkpoint.gptq_format import cut_outputs, why_not_packable
from quasar_core.checkpoint.gptqmodel_names import EXPORTED_FOR, LOADER, NAMINGS, Naming
from quasar_core.checkpoint.headers import StoredLayer, stored_layers
from quasar_core.checkpoint.loaders import Config, judge_gptqmodel
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.errors import QuasarError
from quasar_core.files import read_json_if_there
from quasar_core.records import Progress, no_progress
from quasar_core.store.safetensors_header import read_headers

SECTION = "quantize_config.json"  # the section on its own
DTYPE = torch.float16
_BLOCK = re.compile(r".*?\.?layers\.(\d+)\.")
Tensors = Iterator[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Export:
    """The export of a checkpoint; layers have the names in its files."""

    checkpoint: VerifierCheckpoint
    naming: Naming
    old_section: Mapping[str, Any]  # `quantization_config`
    layers: Mapping[str, StoredLayer]  # that have codes

    @classmethod
    def of(cls, checkpoint: VerifierCheckpoint) -> "Export":
        """QuasarError, one sentence, where nothing need be exported, or where that would not help."""
        folder = checkpoint.folder
        section = checkpoint.config.get("quantization_config") or read_json_if_there(folder / SECTION) or {}
        if not isinstance(checkpoint.format, GptqFormat):
            raise QuasarError(f"{folder} has no codes of GPTQ, and GPTQModel reads it as it is or not at all.")
        layers = stored_layers(checkpoint)
        told = Config.of(section, checkpoint.architecture)
        verdict = judge_gptqmodel(layers, told)
        naming = NAMINGS.get(checkpoint.architecture)
        if not verdict.refused:
            raise QuasarError(f"GPTQModel loads {folder} as it is: there is nothing to export.")
        if naming is None or not verdict.remedy:
            raise QuasarError(f"GPTQModel does not load {folder} under other names either: {verdict.reason}.")
        own = {checkpoint.tensors.stored(layer.name): layer for layer in layers}
        found = cls(checkpoint, naming, section, own)
        found.refuse_unequal_parts()
        return found

    def refuse_unequal_parts(self) -> None:
        """Parts must fill whole words: QuasarError that names the first layer whose do not."""
        for name, layer in self.layers.items():
            size, rest = divmod(layer.out_features, len(self.naming.parts(name)))
            odd = f"{layer.out_features} outputs are no multiple of their number" if rest else None
            if why := odd or why_not_packable(layer.in_features, size, layer.bits):
                raise QuasarError(f"{name} cannot be cut into the layers that GPTQModel has: {why}.")

    def new_layers(self) -> dict[str, StoredLayer]:
        """The layers that have codes afterwards, by their names there."""
        found = {}
        for name, layer in self.layers.items():
            parts = [] if self.naming.keeps(name) else self.naming.parts(name)
            for part in parts:
                found[part] = StoredLayer(
                    part, layer.in_features, layer.out_features // len(parts), layer.bits, layer.group_size
                )
        return found

    def in_16_bits(self) -> list[StoredLayer]:
        """The layers whose weights are written in 16 bits."""
        return [layer for name, layer in self.layers.items() if self.naming.keeps(name)]

    def section(self) -> dict[str, Any]:
        """`quantization_config`: its widths by layer and its list of layers told by the new names."""
        section, layers = dict(self.old_section), self.new_layers()
        usual = Config.of(section).usual
        others = {
            name: {"bits": layer.bits, "group_size": layer.group_size}
            for name, layer in layers.items()
            if (layer.bits, layer.group_size) != usual
        }
        left = {rule: width for rule, width in (section.pop("dynamic", None) or {}).items() if rule.startswith("-:")}
        if rules := {**dynamic_rules(others), **left}:
            section["dynamic"] = rules
        meta = section.get("meta")
        section["meta"] = {**(meta if isinstance(meta, Mapping) else {}), EXPORTED_FOR: LOADER}
        section.pop("modules_in_block_to_quantize", None)
        if listed := listed_layers(list(layers)):
            section["modules_in_block_to_quantize"] = [listed]
        return section

    def bytes(self) -> int:
        """The most bytes that all tensors take."""
        stored = sum(entry.size for entry in read_headers(self.checkpoint.folder))
        return stored + sum(layer.weights * DTYPE.itemsize for layer in self.in_16_bits())

    def tensors(self, progress: Progress = no_progress) -> Tensors:
        """Every tensor under its new name, block after block; what is not of a quantized layer as it is."""
        blocks = blocks_of(self._names())
        for done, names in enumerate(blocks):
            progress("writing", done, len(blocks))
            yield from self._block(names)
        progress("writing", len(blocks), len(blocks))

    def _names(self) -> list[str]:
        files = self.checkpoint.tensors
        return [*map(files.stored, files.names()), *files.beside]

    def _block(self, names: list[str]) -> Tensors:
        held = dict(self.checkpoint.tensors.load_many(names))
        layers: dict[str, dict[str, torch.Tensor]] = {}
        for name in names:
            layer, _, part = name.rpartition(".")
            if layer in self.layers:
                layers.setdefault(layer, {})[part] = held.pop(name)
        for name, tensor in held.items():
            yield from self._unquantized(name, tensor)
        plain: dict[str, torch.Tensor] = {}
        for layer, parts in layers.items():
            codes = {kind: tensor for kind, tensor in parts.items() if kind != "bias"}
            self.checkpoint.format.unpack(layer, codes)  # which refuses what nobody could read
            if self.naming.keeps(layer):
                plain[self.naming.there(layer)] = self._weight(layer, parts)
            else:
                yield from self._renamed(layer, parts)
        yield from stacked(plain) if self.naming.stacked else ((f"{name}.weight", plain[name]) for name in plain)

    def _unquantized(self, name: str, tensor: torch.Tensor) -> Tensors:
        layer, _, kind = name.rpartition(".")
        parts = self.naming.parts(layer)
        if len(parts) == 1:
            yield self.naming.there(name), tensor
            return
        for part, piece in zip(parts, tensor.chunk(len(parts)), strict=True):
            yield f"{part}.{kind}", piece.contiguous()

    def _renamed(self, layer: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        names, bits = self.naming.parts(layer), self.layers[layer].bits
        parts = [tensors] if len(names) == 1 else cut_outputs(tensors, bits, len(names))
        for name, part in zip(names, parts, strict=True):
            for suffix, tensor in part.items():
                yield f"{name}.{suffix}", tensor

    def _weight(self, layer: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if "bias" in tensors:
            raise QuasarError(f"{layer} has a bias, which GPTQModel has no place for.")
        return self.checkpoint.format.unpack(layer, tensors).dequantize(DTYPE)

    def describe(self) -> dict[str, Any]:
        """For the card and for people: how many layers have codes, how many have none any more."""
        return {"layers": len(self.new_layers()), "in_16_bits": len(self.in_16_bits())}


def blocks_of(names: Iterable[str]) -> list[list[str]]:
    """Names of tensors, those of a block together, in the blocks' order; those outside blocks are one lot each."""
    order = sorted(names, key=lambda name: (_block_of(name), name))
    return [list(lot) for _, lot in itertools.groupby(order, key=_block_of)]


def _block_of(name: str) -> tuple[int, str]:
    found = _BLOCK.match(name)
    return (int(found[1]), found[0]) if found else (-1, name)


def stacked(weights: Mapping[str, torch.Tensor]) -> Tensors:
    """Weights of experts by layer, as transformers 5 has them: [E, 2·I, H] of gates and what they gate, [E, H, I]."""
    modules: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name, weight in weights.items():
        module, index, part = name.rsplit(".", 2)
        modules.setdefault(module, {}).setdefault(int(index), {})[part] = weight
    for module, experts in modules.items():
        inner = [torch.cat([experts[index][part] for part in ("gate_proj", "up_proj")]) for index in sorted(experts)]
        yield f"{module}.gate_up_proj", torch.stack(inner)
        yield f"{module}.down_proj", torch.stack([experts[index]["down_proj"] for index in sorted(experts)])
