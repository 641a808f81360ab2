"""The verifier's head in 8 bits: a checkpoint mostly leaves it in 16, and then it is rounded when it is loaded.

A pass on 4-bit codes reads such a head in a quarter to half of its time. In 8 bits that time is half, and what the
verifier chooses changes less than can be measured (dev/log.md). The checkpoint stays as other programs read it.
Letters: V the vocabulary, D the hidden size.
"""

from dataclasses import replace

import torch

from quasar_core.checkpoint.gptq_format import QuantizedWeight, trivial_groups
from quasar_core.kernels.base import LayerShape
from quasar_core.kernels.cpu.vnni import VnniKernel
from quasar_core.kernels.linear import PackedLinear
from quasar_core.kernels.select import DENSE, REFERENCE, KernelChoice, select_kernel
from quasar_core.models.decoder.layer import DenseLinear
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.records import Progress, no_progress

BITS, MIDDLE = 8, 128
GROUPS = (128, 64, 32, 16)  # inputs that share a scale: the first that divides D
SMALLEST = 1 << 22  # weights of a head below which it lies in caches
_ROWS = 1 << 12  # that are rounded at a time


def round_head(verifier: LeanDecoder, progress: Progress = no_progress) -> str | None:
    """Replace a large head of 16 or 32 bits by one of 8; a note where it stays although it is large, else None.

    On a CPU it goes where all other products do, to the kernel of whole passes; on a GPU to the fastest one for it.
    """
    head = verifier.head
    if not isinstance(head, DenseLinear) or not is_rounded(*head.weight.shape, bias=head.bias is not None):
        return None
    group = group_of(head.weight.shape[1])
    shape = LayerShape(head.weight.shape[1], head.weight.shape[0], BITS, group, trivial_groups=True)
    choice = _choose_kernel(verifier, shape, progress)
    if isinstance(choice, str):
        return f"head: it stays in {8 * verifier.dtype.itemsize} bits, as {choice}"
    verifier.head = PackedLinear(rounded(head.weight, group), None, choice, verifier.device, verifier.dtype)
    return None


def is_rounded(vocabulary: int, columns: int, *, bias: bool = False) -> bool:
    """Whether a head [V, D] is one that is rounded where a kernel takes it."""
    return not bias and vocabulary * columns >= SMALLEST and columns % GROUPS[-1] == 0


def group_of(columns: int) -> int:
    """Inputs that share a scale, of the D that `is_rounded` takes."""
    return next(size for size in GROUPS if columns % size == 0)


def rounded_bytes(vocabulary: int, columns: int) -> int:
    """Bytes of codes and scales of a head [V, D]."""
    return vocabulary * (columns + 2 * columns // group_of(columns))


def _choose_kernel(verifier: LeanDecoder, shape: LayerShape, progress: Progress) -> KernelChoice | str:
    """The kernel for a head in 8 bits and why it, or why there is none."""
    found = _of_whole_passes(verifier, shape) if verifier.device.type == "cpu" else _fastest(verifier, shape, progress)
    if isinstance(found, str):
        return found
    said = f"as the head of {8 * verifier.dtype.itemsize} bits is rounded to {BITS} at load"
    return replace(found, reason="; ".join([said, *([found.reason] if found.reason else [])]))


def _of_whole_passes(verifier: LeanDecoder, shape: LayerShape) -> KernelChoice | str:
    """On a CPU: the kernel of passes in C++, where all other products run on it."""
    kernel, others = VnniKernel(), _kernels(verifier)
    if others != {kernel.name}:
        return f"the other products run on {', '.join(sorted(others)) or 'nothing packed'}, and it on {kernel.name}"
    return kernel.why_not(shape, verifier.device, verifier.dtype) or KernelChoice(kernel, "")


def _fastest(verifier: LeanDecoder, shape: LayerShape, progress: Progress) -> KernelChoice | str:
    """On a GPU: the fastest one, where products run on packed codes."""
    if _kernels(verifier) <= {DENSE.name, REFERENCE.name}:
        return "the other products are dequantized"
    choice = select_kernel(shape, verifier.device, verifier.dtype, progress=progress)
    return f"no kernel for {BITS} bits is faster ({choice.reason})" if choice.kernel is DENSE else choice


def _kernels(verifier: LeanDecoder) -> set[str]:
    return {layer.choice.kernel.name for layer in verifier.packed_layers}


def rounded(weight: torch.Tensor, group: int) -> QuantizedWeight:
    """A weight [V, D] to the nearest of 255 values around 0, which reach to the largest magnitude of each group."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(len(weight), weight.shape[1] // group, dtype=torch.float16, device=weight.device)
    for rows, own_codes, own_scales in zip(*(whole.split(_ROWS) for whole in (weight, codes, scales)), strict=True):
        grouped = rows.float().view(len(rows), -1, group)
        own_scales.copy_(grouped.abs().amax(-1) / (MIDDLE - 1))
        steps = own_scales.float().clamp_min(torch.finfo(torch.float16).smallest_normal)[..., None]
        nearest = (grouped / steps).round_().clamp_(1 - MIDDLE, MIDDLE - 1)
        own_codes.copy_(nearest.add_(MIDDLE).flatten(1))
    zeros = torch.full_like(scales, MIDDLE, dtype=torch.int32)
    groups = trivial_groups(weight.shape[1], group).to(weight.device)
    return QuantizedWeight(BITS, group, codes.t(), scales.t(), zeros.t(), groups)
