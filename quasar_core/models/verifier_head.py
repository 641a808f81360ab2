"""The verifier's head in 8 bits: a checkpoint mostly leaves it in 16, and then it is rounded when it is loaded.

A pass on 4-bit codes reads such a head in a quarter to half of its time. In 8 bits that time is half, and what the
verifier chooses changes less than can be measured (dev/log.md). The checkpoint stays as other programs read it.
Letters: V the vocabulary, D the hidden size.
"""

import torch

from quasar_core.checkpoint.gptq_format import QuantizedWeight, trivial_groups
from quasar_core.kernels.base import LayerShape
from quasar_core.kernels.cpu.vnni import VnniKernel
from quasar_core.kernels.linear import PackedLinear
from quasar_core.kernels.select import KernelChoice
from quasar_core.models.decoder import LeanDecoder
from quasar_core.models.decoder_layer import DenseLinear

BITS, MIDDLE = 8, 128
GROUPS = (128, 64, 32, 16)  # inputs that share a scale: the first that divides D
SMALLEST = 1 << 22  # weights of a head below which it lies in the processor's caches
_ROWS = 1 << 12  # that are rounded at a time


def round_head(verifier: LeanDecoder) -> None:
    """Replace a head of 16 or 32 bits where all other products run on the kernel of whole passes, and say so."""
    head = verifier.head
    if not isinstance(head, DenseLinear) or head.bias is not None or head.weight.numel() < SMALLEST:
        return
    kernel = VnniKernel()
    group = next((size for size in GROUPS if head.weight.shape[1] % size == 0), None)
    if group is None or {layer.choice.kernel.name for layer in verifier.packed_layers} != {kernel.name}:
        return
    shape = LayerShape(head.weight.shape[1], head.weight.shape[0], BITS, group, trivial_groups=True)
    if kernel.why_not(shape, verifier.device, verifier.dtype):
        return
    choice = KernelChoice(kernel, f"as the head of {8 * verifier.dtype.itemsize} bits is rounded to {BITS} at load")
    verifier.head = PackedLinear(rounded(head.weight, group), None, choice, verifier.device, verifier.dtype)


def rounded(weight: torch.Tensor, group: int) -> QuantizedWeight:
    """A weight [V, D] to the nearest of 255 values around 0, which reach to the largest magnitude of each group."""
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    scales = torch.empty(len(weight), weight.shape[1] // group, dtype=torch.float16)
    for rows, own_codes, own_scales in zip(*(whole.split(_ROWS) for whole in (weight, codes, scales)), strict=True):
        grouped = rows.float().view(len(rows), -1, group)
        own_scales.copy_(grouped.abs().amax(-1) / (MIDDLE - 1))
        steps = own_scales.float().clamp_min(torch.finfo(torch.float16).smallest_normal)[..., None]
        nearest = (grouped / steps).round_().clamp_(1 - MIDDLE, MIDDLE - 1)
        own_codes.copy_(nearest.add_(MIDDLE).flatten(1))
    zeros = torch.full_like(scales, MIDDLE, dtype=torch.int32)
    return QuantizedWeight(BITS, group, codes.t(), scales.t(), zeros.t(), trivial_groups(weight.shape[1], group))
