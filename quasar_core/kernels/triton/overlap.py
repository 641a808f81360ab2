"""Launches that begin before the one before them has ended: programmatic dependent launch, of Hopper and later.

A kernel's programs are set up, and weights are fetched into the GPU's second-level cache, while the last programs of
the kernel before it are at work. Nothing that a kernel has written is read, and nothing is written, before every launch
earlier in the stream has ended: each kernel begins with that wait. So results are the same, with it and without.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton.language as tl
from triton import jit

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
