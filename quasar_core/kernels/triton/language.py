"""What the kernels share: helpers in Triton's language, scratch memory, and overlapping launches.

Triton's interpreter holds bfloat16 as bare bits, so products are taken in float32 there (the same sums, as a product
of two 16-bit numbers is exact in float32), and it knows no inline assembly. Scratch is reserved once and never moves,
so that CUDA graphs may point to it. Overlapping launches are Hopper's programmatic dependent launch: a kernel's
programs are set up, and weights fetched into the second-level cache, while the kernel before it ends. Each kernel
first waits for every earlier launch before it reads or writes what others do, so results are the same with it and
without.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from triton import jit

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
ROWS = tl.constexpr(16)  # rows of a pass as tensor cores take them


@triton.jit
def matrix_product(a, b, acc):
    """acc + a·b: 16-bit operands, float32 accumulator."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Float32 x as it would be after a store in `dtype`."""
    return x.to(dtype).to(tl.float32)


@triton.jit
def subtract_pairs(pairs, offsets, dtype: tl.constexpr):
    """Two 16-bit floats in each int32, minus two others; both are small whole numbers, so nothing is rounded."""
    negative = offsets ^ -2147450880  # 0x80008000, the signs
    if dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [pairs, 0x3F803F80, negative], tl.int32, True, 1
        )
    return tl.inline_asm_elementwise(
        "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [pairs, 0x3C003C00, negative], tl.int32, True, 1
    )


PARTIAL_FLOATS = 8 * 1024 * 1024  # 32 MiB: partial products of one call
_COUNTERS = 16384


@dataclass(frozen=True)
class Scratch:
    """Shared by all calls on a device, which are therefore on one stream at a time."""

    partials: torch.Tensor  # float32
    counters: torch.Tensor  # int32; zero between calls

    def fits(self, splits: int, rows: int, blocks: int) -> bool:
        """Whether `splits` partial products of `rows` values in `blocks` blocks have room."""
        return splits * rows <= self.partials.numel() and blocks <= self.counters.numel()


@cache
def scratch(device: torch.device) -> Scratch:
    """The device's scratch; the first call, which must not be inside of a graph's capture, reserves it."""
    partials = torch.empty(PARTIAL_FLOATS, dtype=torch.float32, device=device)
    return Scratch(partials, torch.zeros(_COUNTERS, dtype=torch.int32, device=device))


_CAPABILITY = (9, 0)
SWITCH = "QUASAR_OVERLAP"  # a variable that is 0 where launches are to follow one another

_options: dict[str, bool] = {"OVERLAPS": False}  # of the launches from now on


def why_not_overlapping(device: torch.device) -> str | None:
    """Why launches cannot overlap on a device, or None where they can."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH} is 0"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _CAPABILITY:
        return f"it needs compute capability {'.'.join(map(str, _CAPABILITY))}"
    return None if hasattr(tl.extra.cuda, "gdc_wait") else "this Triton does not know it"


def overlap() -> dict[str, bool]:
    """What every launch of a pass is given beside its own options."""
    return _options


@contextmanager
def overlapping(wanted: bool) -> Iterator[None]:
    """Launches within the context overlap, or do not."""
    global _options
    before = _options
    _options = {"OVERLAPS": True, "launch_pdl": True} if wanted else {"OVERLAPS": False}
    try:
        yield
    finally:
        _options = before


@jit
def wait(OVERLAPS: tl.constexpr):
    """Let the next launch begin, then wait until all before this one have ended, and what they wrote can be read."""
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@jit
def fetch_lines(pointers):
    """Ask for the lines at these pointers, which no launch writes to; nothing waits for them."""
    addresses = pointers.to(tl.int64, bitcast=True)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses], tl.int32, is_pure=False, pack=1
    )


@jit
def fetch_rows(weight_ptr, outputs, begin, in_features, out_features):
    """The first 512 bytes that a program reads of its rows in a weight [out, in]."""
    line: tl.constexpr = 128 // (weight_ptr.dtype.element_ty.primitive_bitwidth // 8)
    inputs = tl.minimum(begin + tl.arange(0, 4) * line, in_features - 1)
    rows = tl.minimum(outputs, out_features - 1).to(tl.int64) * in_features
    fetch_lines(weight_ptr + rows[:, None] + inputs[None, :])
