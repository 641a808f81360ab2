"""What GPTQModel calls the layers of a family, where it is not what the files have, and which it keeps in 16 bits.

Read in GPTQModel 7.6's definitions (`models/definitions/`) and those of the package that takes models apart for it
(defuser 0.0.28), and seen in the models that it makes of small checkpoints with transformers 5.23. It looks for codes
where its definition has a layer that the model has too:

- what Phi and GLM-4 store as one layer of gate and up are two;
- Mixtral's experts have the names that most others' have;
- Granite's definition has experts by the names of an earlier transformers, LFM2's by those of the files, Gemma 4's
  none: the models have `experts.N.gate_proj` there, or one tensor of all experts. So their experts have no codes in a
  checkpoint that GPTQModel writes itself, and must have none in one that it is to read. Nor has LFM2's `out_proj` of
  attention, where it has experts.

GPTQModel itself writes checkpoints under these names, so they are read here under the model's own (`own_layers`).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

LOADER = "gptqmodel"
EXPORTED_FOR = "exported_for"  # in the `meta` of a checkpoint that was exported
Renamed = tuple[tuple[str, str], ...]  # parts of names: in the files, and there


@dataclass(frozen=True)
class Naming:
    """How a family is called there; `split` are last names of layers that are several there, output after output."""

    renamed: Renamed = ()
    of_experts: Renamed = ()  # in names of experts alone
    split: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    in_16_bits: re.Pattern[str] | None = None  # layers whose codes it does not read
    stacked: bool = False  # experts in 16 bits are one tensor for all: of gates and what they gate, of what is behind

    def there(self, name: str) -> str:
        """A tensor's or layer's name there."""
        renamed = (*self.renamed, *(self.of_experts if ".experts." in name else ()))
        return _replaced(name, renamed)

    def parts(self, layer: str) -> tuple[str, ...]:
        """The layers that a layer of the files is there."""
        before, dot, last = layer.rpartition(".")
        return tuple(self.there(f"{before}{dot}{part}") for part in self.split.get(last, (last,)))

    def keeps(self, layer: str) -> bool:
        """Whether it has a layer of the files in 16 bits."""
        return bool(self.in_16_bits and self.in_16_bits.search(layer))

    def own(self, layer: str) -> tuple[str, int]:
        """The model's name of a layer that is called so there, and which part of that it is."""
        names = (*self.renamed, *(self.of_experts if ".experts." in layer else ()))
        found = _replaced(layer, tuple((there, here) for here, there in names))
        before, dot, last = found.rpartition(".")
        for whole, parts in self.split.items():
            if last in parts:
                return f"{before}{dot}{whole}", parts.index(last)
        return found, 0


def _replaced(name: str, parts: Renamed) -> str:
    name = f"{name}."
    for old, new in parts:
        name = name.replace(old, new)
    return name.removesuffix(".")


GATE_UP = {"gate_up_proj": ("gate_proj", "up_proj")}
WITH_NUMBERS = ((".w1.", ".gate_proj."), (".w3.", ".up_proj."), (".w2.", ".down_proj."))
EXPERTS = re.compile(r"\.experts\.\d+\.")
GRANITE = Naming(renamed=((".router.layer.", ".router."),), in_16_bits=EXPERTS)
NAMINGS: Mapping[str, Naming] = {
    "Phi3ForCausalLM": Naming(split=GATE_UP),
    "Glm4ForCausalLM": Naming(split=GATE_UP),
    "MixtralForCausalLM": Naming(renamed=((".block_sparse_moe.", ".mlp."),), of_experts=WITH_NUMBERS),
    "GraniteMoeForCausalLM": GRANITE,
    "GraniteMoeSharedForCausalLM": GRANITE,
    "Lfm2MoeForCausalLM": Naming(
        of_experts=WITH_NUMBERS, in_16_bits=re.compile(r"\.experts\.\d+\.|\.self_attn\.out_proj$")
    ),
    "Gemma4ForCausalLM": Naming(in_16_bits=EXPERTS, stacked=True),
}
USUAL = Naming()


def is_exported(section: Mapping[str, Any]) -> bool:
    """Whether a checkpoint of this `quantization_config` was exported under these names."""
    meta = section.get("meta")
    return isinstance(meta, Mapping) and meta.get(EXPORTED_FOR) == LOADER


def own_layers(stored: Iterable[str], architecture: str) -> dict[str, tuple[str, ...]]:
    """The layers of a checkpoint by the model's own names, sorted; each with its parts by the names in the files.

    A layer that only some parts are there of keeps the names in the files, which the model has not.
    """
    naming, stored = NAMINGS.get(architecture, USUAL), set(stored)
    found: dict[str, tuple[str, ...]] = {}
    for name in stored:
        own, _ = naming.own(name)
        parts = naming.parts(own)
        whole = name != own and stored.issuperset(parts)
        found[own if whole else name] = parts if whole else (name,)
    return dict(sorted(found.items()))
