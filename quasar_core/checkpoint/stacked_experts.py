"""Experts that are stored as one tensor: read as though each had tensors of its own, as most files have them.

transformers 5 may write a mixture as two tensors, gates and what they gate [E, 2·I, H] and what comes behind [E, H, I];
Granite's are always so. mlx writes three, under `switch_mlp`. Each becomes the weights of E experts, under
`experts.N.gate_proj` and so on. Letters: E experts, I intermediate, H hidden.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from quasar_core.store.safetensors_header import TensorEntry

# Names of both tensors, and what they are called below `experts`.
FORMS = {
    "experts.gate_up_proj": "experts.down_proj",
    "input_linear.weight": "output_linear.weight",
}

_CODES = frozenset(("F8_E4M3", "I8", "U8", "U32"))  # whose scales would have to be apart too
_MLX = re.compile(r"(.*\.)switch_mlp\.((?:gate|up|down)_proj)\.weight")


@dataclass(frozen=True)
class Part:
    """Rows [begin, end) of the expert `index`, in the stored tensor `name`."""

    name: str
    index: int
    begin: int
    end: int

    def read(self, file: Any, stored: str) -> torch.Tensor:
        """The tensor, from the open file that holds the whole by this name."""
        rows: torch.Tensor = file.get_slice(stored)[self.index : self.index + 1, self.begin : self.end]
        return rows[0]


def separate(entries: Mapping[str, TensorEntry]) -> tuple[dict[str, TensorEntry], dict[str, Part]]:
    """The entries with those of experts apart, and which part of which tensor they are."""
    parts = dict(_all_parts(entries))
    whole = {part.name for part in parts.values()}
    found = {name: entry for name, entry in entries.items() if name not in whole}
    return found | {name: _entry(name, part, entries[part.name]) for name, part in parts.items()}, parts


def _all_parts(entries: Mapping[str, TensorEntry]) -> Iterator[tuple[str, Part]]:
    for name, first in entries.items():
        mlx = _MLX.fullmatch(name)
        if mlx and len(first.shape) == 3 and first.dtype not in _CODES:
            for index in range(first.shape[0]):
                yield f"{mlx[1]}experts.{index}.{mlx[2]}.weight", Part(name, index, 0, first.shape[1])
        form = next((form for form in FORMS if name.endswith(f".{form}")), None)
        second = entries.get(name.removesuffix(form) + FORMS[form]) if form else None
        if form and second and _belong_together(first, second):
            yield from _parts(name.removesuffix(form), first, second)


def _belong_together(first: TensorEntry, second: TensorEntry) -> bool:
    if len(first.shape) != 3 or len(second.shape) != 3 or {first.dtype, second.dtype} & _CODES:
        return False
    (count, rows, hidden), (other, outputs, inner) = first.shape, second.shape
    return (count, rows, hidden) == (other, 2 * inner, outputs)


def _parts(module: str, first: TensorEntry, second: TensorEntry) -> list[tuple[str, Part]]:
    count, hidden, inner = second.shape
    rows = {
        "gate_proj": (first.name, 0, inner),
        "up_proj": (first.name, inner, 2 * inner),
        "down_proj": (second.name, 0, hidden),
    }
    return [
        (f"{module}experts.{index}.{part}.weight", Part(name, index, begin, end))
        for index in range(count)
        for part, (name, begin, end) in rows.items()
    ]


def _entry(name: str, part: Part, whole: TensorEntry) -> TensorEntry:
    """Where the part's bytes lie."""
    count, rows, columns = whole.shape
    row = whole.size // (count * rows)
    start = whole.start + (part.index * rows + part.begin) * row
    return replace(
        whole, name=name, shape=(part.end - part.begin, columns), start=start, size=(part.end - part.begin) * row
    )
