"""Attention that rotates its own queries, writes the new keys and values, and merges: against launches of their own."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from quasar_core.kernels.triton.attention import attend
from quasar_core.kernels.triton.language import scratch
from quasar_core.kernels.triton.rotation import Rotation, rotate_and_store
from quasar_core.kernels.triton.shares import attention_workspace
from tools.gpu_bench.cases import TOLERANCE, Case, name_of, poisoned, relative_error

FAMILIES = (0b1, 0b11, 0b101, 0b1011)  # of a tree of four nodes
DEPTHS = (0, 1, 1, 2)


@dataclass(frozen=True)
class Shape:
    """Of a pass's attention, and what is done to its heads."""

    tokens: int
    heads: int
    kv_heads: int
    size: int
    position: int
    window: int | None = None
    norms: str = "first"  # or last, or none
    rotates: bool = True
    interleaved: bool = False
    is_tree: bool = False
    writes: bool = True

    @property
    def name(self) -> str:
        """In words."""
        parts = [f"{self.tokens} tokens, {self.heads}/{self.kv_heads} heads of {self.size} at {self.position}"]
        parts += [f"window {self.window}"] if self.window else []
        parts += [f"norms {self.norms}"] + ["no rotation"] * (not self.rotates) + ["interleaved"] * self.interleaved
        return ", ".join(parts + ["a tree"] * self.is_tree + ["queries alone"] * (not self.writes))


SMALL = (
    Shape(1, 4, 2, 32, 0, norms="none"),
    Shape(3, 4, 2, 32, 126, rotates=False),
    Shape(5, 6, 2, 32, 62, window=40, norms="last"),
    Shape(4, 2, 1, 80, 190, is_tree=True),
    Shape(2, 4, 1, 32, 1100, interleaved=True),
    Shape(2, 4, 2, 32, 70, writes=False),
)


def joined_attention_cases(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """Texts on both sides of a share's end, norms on both sides of the rotation, a tree, a window."""
    large = (Shape(t, 32, 8, 128, at) for t in (1, 4, 8, 16) for at in (0, 511, 8000))
    for shape in SMALL if small else (*SMALL, *large):
        yield f"joined attention {shape.name} {name_of(dtype)}", partial(check, shape, device, dtype)


def check(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """The greatest difference of outputs and states from those of three launches; not a number if a counter stays."""
    joined, apart = (run(shape, ways, device, dtype) for ways in (True, False))
    errors = [relative_error(own, other.double()) for own, other in zip(joined, apart, strict=True)]
    left = bool(scratch(device).counters.any())
    return math.nan if left or any(map(math.isnan, errors)) else max(errors), TOLERANCE[dtype]


def run(shape: Shape, joins: bool, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and states behind the pass, whose inputs a seed fixes."""
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).to(device=device, dtype=dtype)

    end, bound = shape.position + shape.tokens, shape.position + shape.tokens + 70
    heads = shape.heads + (2 * shape.kv_heads if shape.writes else 0)
    qkv, states = random(shape.tokens, heads * shape.size), random(2, shape.kv_heads, bound, shape.size)
    states[:, :, shape.position if shape.writes else end :] = math.nan  # nothing is read that was not written
    rotation = _rotation(shape, random, bound)
    position = torch.tensor([shape.position], device=device)
    depths, families = (torch.tensor(row, device=device) for row in (DEPTHS, FAMILIES))
    tree, rows = (depths, families) if shape.is_tree else None, qkv
    if not joins:
        rows = poisoned(shape.tokens, shape.heads, shape.size, device=device, dtype=dtype)
        keys, values = states if shape.writes else states[:, :0]
        rotate_and_store(qkv, rotation, position, keys, values, rows, depths=depths if shape.is_tree else None)
    workspace = attention_workspace(device, shape.tokens, shape.heads, shape.size, bound).fill_(math.nan)
    out = poisoned(shape.tokens, shape.heads * shape.size, device=device, dtype=dtype)
    where = position, shape.window, workspace, out, bound
    attend(rows, states[0], states[1], *where, tree=tree, rotation=rotation if joins else None, merges=joins)
    return out, states[:, :, :end]


def _rotation(shape: Shape, random: Callable[..., torch.Tensor], positions: int) -> Rotation:
    norms = None if shape.norms == "none" else random(shape.heads + shape.kv_heads, shape.size)
    angles = random(positions, shape.size // 2).float()
    cos, sin = angles.cos(), angles.sin()
    cos, sin = (torch.cat(halves, -1).to(random(1)) for halves in ((cos, cos), (-sin, sin)))
    found = Rotation(norms, cos, sin, 1e-6, interleaved=shape.interleaved, norms_last=shape.norms == "last")
    return found if shape.rotates else replace(found, cos=None, sin=None)
