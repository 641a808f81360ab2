"""Which kernel runs a layer, and why: explicit, never silent."""

from dataclasses import dataclass

import torch

from quasar_core.errors import UsageError
from quasar_core.kernels.base import Kernel, LayerShape
from quasar_core.kernels.dense import DenseKernel
from quasar_core.kernels.int4 import CpuInt4Kernel, CudaInt4Kernel
from quasar_core.kernels.reference import ReferenceKernel
from quasar_core.kernels.vnni import VnniKernel

# Fastest first, as measured: on the CPU vnni takes half of torch-int4-cpu's time at one row, a quarter at eight.
# Dense and reference support everything: dense unpacks once, reference for each product.
PACKED_KERNELS: tuple[Kernel, ...] = (CudaInt4Kernel(), VnniKernel(), CpuInt4Kernel())
DENSE = DenseKernel()
KERNELS: tuple[Kernel, ...] = (*PACKED_KERNELS, DENSE, ReferenceKernel())
KERNEL_NAMES = tuple(kernel.name for kernel in KERNELS)


@dataclass(frozen=True)
class KernelChoice:
    """A kernel, and the sentence that says why it."""

    kernel: Kernel
    reason: str


@dataclass(frozen=True)
class KernelReport:
    """For `quasar doctor`: whether a kernel runs a common 4-bit layer here."""

    name: str
    usable: bool
    reason: str


def select_kernel(shape: LayerShape, device: torch.device, dtype: torch.dtype, requested: str = "auto") -> KernelChoice:
    """The first kernel that supports the layer, or the requested one; UsageError where that one does not.

    Where no kernel runs on packed codes the weight is unpacked once, at load, and the reason says so.
    """
    if requested != "auto":
        kernel = _kernel_named(requested)
        obstacle = kernel.why_not(shape, device, dtype)
        if obstacle:
            raise UsageError(f"--kernel {requested} cannot run this verifier: {obstacle}.")
        return KernelChoice(kernel, "asked for by --kernel")
    refused: list[str] = []
    for kernel in PACKED_KERNELS:
        obstacle = kernel.why_not(shape, device, dtype)
        if obstacle is None:
            return KernelChoice(kernel, "; ".join(refused) or "the fastest here")
        if not obstacle.startswith("it runs on"):
            refused.append(f"not {kernel.name}: {obstacle}")
    return KernelChoice(DENSE, "; ".join([*refused, "so unpacked at load"]))


def _kernel_named(name: str) -> Kernel:
    for kernel in KERNELS:
        if kernel.name == name:
            return kernel
    raise UsageError(f"--kernel must be one of auto, {', '.join(KERNEL_NAMES)}, not {name}.")


def describe_kernels(device: torch.device, dtype: torch.dtype) -> list[KernelReport]:
    """What each kernel says of a 4096 × 4096 layer of 4 bits in groups of 128."""
    shape = LayerShape(4096, 4096, bits=4, group_size=128, trivial_groups=True)
    reports = []
    for kernel in KERNELS:
        obstacle = kernel.why_not(shape, device, dtype)
        reports.append(KernelReport(kernel.name, obstacle is None, obstacle or "runs 4-bit layers in groups of 128"))
    return reports
