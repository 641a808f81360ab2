"""Choose the kernel that runs a layer, by measuring on first use, and say why."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quasar_core.errors import UsageError
from quasar_core.kernels.base import Kernel, LayerShape
from quasar_core.kernels.cpu.forms import has_lanes
from quasar_core.kernels.cpu.vnni import VnniKernel
from quasar_core.kernels.dense import DenseKernel, ReferenceKernel, why_no_room
from quasar_core.kernels.eight_bit import Float8Kernel, Int8Kernel, product_saturates
from quasar_core.kernels.humming import HummingKernel
from quasar_core.kernels.int4 import CpuInt4Kernel, CudaInt4Kernel
from quasar_core.kernels.marlin import MarlinKernel
from quasar_core.kernels.times import KernelFigures, Times, kernel_times
from quasar_core.kernels.triton.adapters import TRITON_FLOAT8, TRITON_INT8, TritonKernel
from quasar_core.records import Progress, no_progress

# In the order in which they are taken where nothing is measured. Dense and reference support everything: dense
# dequantizes once, and competes where memory allows; reference does it for each product, and is only ever asked for.
PACKED_KERNELS: tuple[Kernel, ...] = (
    CudaInt4Kernel(),
    TritonKernel(),
    MarlinKernel(),
    HummingKernel(),
    VnniKernel(),
    CpuInt4Kernel(),
    TRITON_INT8,
    Int8Kernel(),
)
FLOATING_KERNELS: tuple[Kernel, ...] = (TRITON_FLOAT8, Float8Kernel())  # for 8-bit floating-point values
DENSE, REFERENCE = DenseKernel(), ReferenceKernel()
KERNELS: tuple[Kernel, ...] = (*PACKED_KERNELS, DENSE, REFERENCE)
IN_FLOAT32 = "int8 multiplies in float32, as this processor's integer products are cut to 16 bits"
KERNEL_NAMES = tuple(kernel.name for kernel in (*KERNELS, *FLOATING_KERNELS))

DECISIVE_ROWS = 4  # of a verify: what the choice goes by
# Whole passes run in C++ where all their packed products are on this kernel. Calls one by one do not show what that is
# worth: they cost more than the products of a small layer. So it is not measured where it has vectors, and elsewhere
# another one must lead by so much.
FUSED, LEAD = "vnni", 1.5
SMALLEST = 2**16  # weights of a layer that is measured: calling a smaller product takes longer than computing it
COMMON = LayerShape(4096, 4096, bits=4, group_size=128, trivial_groups=True)


@dataclass(frozen=True)
class KernelChoice:
    """A kernel, and the sentence that says why it."""

    kernel: Kernel
    reason: str


@dataclass(frozen=True)
class KernelReport:
    """For `quasar doctor`: whether a kernel runs a common 4-bit layer here; its seconds at 4 rows if it competes."""

    name: str
    usable: bool
    reason: str
    seconds: float | None


def packed_kernels(shape: LayerShape) -> tuple[Kernel, ...]:
    """The kernels for layers of a kind, in their order."""
    return FLOATING_KERNELS if shape.floating else PACKED_KERNELS


def select_kernel(
    shape: LayerShape,
    device: torch.device,
    dtype: torch.dtype,
    requested: str = "auto",
    progress: Progress = no_progress,
) -> KernelChoice:
    """The fastest kernel for the layer, or the requested one; UsageError where that one does not support it.

    Where no kernel runs on packed codes the weight is dequantized once, at load, and the reason says so.
    """
    if requested != "auto":
        return _requested_kernel(requested, shape, device, dtype)
    able, refused = _candidates(shape, device, dtype)
    if not able:
        return KernelChoice(DENSE, "; ".join([*refused, "so dequantized at load"]))
    fused = next((kernel for kernel in able if kernel.name == FUSED), None)
    if fused and has_lanes():
        return KernelChoice(fused, "; ".join([*refused, "what whole passes run on in C++"]))
    if shape.in_features * shape.out_features < SMALLEST:
        return KernelChoice(able[0], "; ".join(refused) or "the first choice for layers too small to be measured")
    no_room = why_no_room(shape, device, dtype)
    if no_room:
        refused.append(f"not dense: {no_room}")
    else:
        able.append(DENSE)
    if len(able) == 1:
        return KernelChoice(able[0], "; ".join([*refused, "the only one left"]))
    return _fastest(able, refused, shape, kernel_times(device, dtype).of(able, shape, progress))


def routed_kernel(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> KernelChoice | None:
    """The one kernel that recorded passes have for an expert that tokens choose, where that can run it."""
    kernel = TritonKernel(tight=True)
    if shape.floating or kernel.why_not(shape, device, dtype):
        return None
    return KernelChoice(kernel, "what recorded passes run chosen experts on")


def _fastest(able: Sequence[Kernel], refused: Sequence[str], shape: LayerShape, figures: KernelFigures) -> KernelChoice:
    """Choose by times that repeat; where some do not, the first in the order, since nothing is known.

    Kernels that failed while they were measured are left out; where that leaves none, the weight is dequantized.
    """
    times, trouble = figures.seconds, figures.trouble
    refused = [
        *refused,
        *(f"not {name}: it failed while it was measured ({why})" for name, why in figures.failed.items()),
    ]
    able = [kernel for kernel in able if kernel.name not in figures.failed]
    if not able:
        return KernelChoice(DENSE, "; ".join([*refused, "so dequantized at load"]))
    if figures.guesses:
        names = ", ".join(sorted(figures.guesses))
        why = f"the first of {len(able)} in their order, as the times of {names} do not repeat here"
        return KernelChoice(able[0], "; ".join([*refused, why, *([trouble] if trouble else [])]))
    chosen, why = choose_fastest(able, times)
    others = sorted((kernel for kernel in able if kernel is not chosen), key=lambda k: times[k.name][DECISIVE_ROWS])
    slower = ", ".join(f"{kernel.name} {microseconds(times[kernel.name])}" for kernel in others)
    measured = (
        f"{why} of {len(able)} for {shape.in_features} → {shape.out_features}: "
        f"{microseconds(times[chosen.name])} µs at {DECISIVE_ROWS} rows, {slower}"
    )
    return KernelChoice(chosen, "; ".join([*refused, measured, *([trouble] if trouble else [])]))


def choose_fastest(able: Sequence[Kernel], times: dict[str, Times]) -> tuple[Kernel, str]:
    """The kernel of the least time at a verify's rows, and what to call it; FUSED unless another leads by LEAD."""
    fastest = min(able, key=lambda kernel: times[kernel.name][DECISIVE_ROWS])
    fused = next((kernel for kernel in able if kernel.name == FUSED), None)
    if fused is None or fused is fastest:
        return fastest, "fastest"
    if times[fused.name][DECISIVE_ROWS] <= LEAD * times[fastest.name][DECISIVE_ROWS]:
        return fused, "not much behind the fastest, and what whole passes run on,"
    return fastest, "fastest"


def microseconds(times: Times) -> str:
    """At a verify's rows, to three digits."""
    value = 1e6 * times[DECISIVE_ROWS]
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _candidates(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> tuple[list[Kernel], list[str]]:
    """The kernels that run on codes or values of this shape, and why those of this device that stand before do not.

    Or do, and otherwise than their name says.
    """
    able, refused = list[Kernel](), list[str]()
    for kernel in packed_kernels(shape):
        obstacle = kernel.why_not(shape, device, dtype)
        if obstacle is None:
            able.append(kernel)
            if isinstance(kernel, Int8Kernel) and device.type == "cpu" and product_saturates():
                refused.append(IN_FLOAT32)
        elif not able and (shape.floating or not obstacle.startswith("it runs on")):
            refused.append(f"not {kernel.name}: {obstacle}")
    return able, refused


def check_kernel_name(name: str) -> None:
    """UsageError for a name that no kernel has."""
    if name not in ("auto", *KERNEL_NAMES):
        raise UsageError(f"--kernel must be one of auto, {', '.join(KERNEL_NAMES)}, not {name}.")


def _requested_kernel(name: str, shape: LayerShape, device: torch.device, dtype: torch.dtype) -> KernelChoice:
    check_kernel_name(name)
    takes = (*FLOATING_KERNELS, DENSE) if shape.floating else KERNELS
    kernel = next((kernel for kernel in takes if kernel.name == name), None)
    if kernel is None:
        weights = "8-bit floating point" if shape.floating else f"{shape.bits}-bit codes"
        raise UsageError(f"--kernel {name} cannot run this verifier: its weights are {weights}.")
    if isinstance(kernel, Float8Kernel) and device.type == "cpu":
        return KernelChoice(kernel, "asked for by --kernel, computed in float32")
    obstacle = kernel.why_not(shape, device, dtype)
    if obstacle:
        raise UsageError(f"--kernel {name} cannot run this verifier: {obstacle}.")
    if isinstance(kernel, Int8Kernel) and device.type == "cpu" and product_saturates():
        return KernelChoice(kernel, f"asked for by --kernel; {IN_FLOAT32}")
    return KernelChoice(kernel, "asked for by --kernel")


def describe_kernels(device: torch.device, dtype: torch.dtype, progress: Progress = no_progress) -> list[KernelReport]:
    """What each kernel says of a 4096 × 4096 layer of 4 bits in groups of 128, measured where it competes."""
    able = [*_candidates(COMMON, device, dtype)[0], DENSE]
    figures = kernel_times(device, dtype).of(able, COMMON, progress)
    able = [kernel for kernel in able if kernel.name not in figures.failed] or [DENSE]
    chosen = able[0] if figures.guesses or figures.failed.get(DENSE.name) else choose_fastest(able, figures.seconds)[0]
    return [_report(kernel, figures, kernel is chosen, device, dtype) for kernel in KERNELS]


def _report(
    kernel: Kernel, figures: KernelFigures, is_chosen: bool, device: torch.device, dtype: torch.dtype
) -> KernelReport:
    obstacle = kernel.why_not(COMMON, device, dtype)
    if kernel.name in figures.failed:
        obstacle = f"it failed while it was measured ({figures.failed[kernel.name]})"
    if obstacle:
        return KernelReport(kernel.name, False, obstacle, None)
    times = figures.seconds.get(kernel.name)
    if times is None:
        reason = "only by --kernel: dequantizes again for every product; the others are tested against it"
        return KernelReport(kernel.name, True, reason, None)
    layer = f"{COMMON.in_features} × {COMMON.out_features} layer of {COMMON.bits} bits"
    reason = f"{microseconds(times)} µs at {DECISIVE_ROWS} rows of a {layer}"
    reason += " (a guess: its times do not repeat)" if kernel.name in figures.guesses else ""
    reason += ": chosen" if is_chosen else ""
    reason += f"; {figures.trouble}" if figures.trouble else ""
    if kernel is DENSE:
        reason += "; dequantized once, at load, so as large as the target's, and taken where no other kernel is as fast"
    return KernelReport(kernel.name, True, reason, times[DECISIVE_ROWS])
