"""Whether Triton's kernels run is decided by one of them, built and run; each reason is told."""

from collections.abc import Iterator
from contextlib import nullcontext
from subprocess import CalledProcessError
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import interpreted  # noqa: F401  # first: it decides how kernels are compiled

from quasar_core.kernels.base import LayerShape
from quasar_core.kernels.eight_bit import Float8Kernel
from quasar_core.kernels.int4 import CudaInt4Kernel
from quasar_core.kernels.marlin import MarlinKernel
from quasar_core.kernels.triton import adapters, probe
from quasar_core.kernels.triton.adapters import why_not_triton

CUDA, BF16 = torch.device("cuda", 0), torch.bfloat16
SHAPE = LayerShape(256, 64, 4, 64, True)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that could run them; nothing is remembered of the last one."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(adapters, "on", lambda device: nullcontext())
    adapters._why_not_built.cache_clear()
    yield
    adapters._why_not_built.cache_clear()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Failed to find C compiler. Please specify via CC"), "Failed to find C compiler."),
        (CalledProcessError(1, ["/usr/bin/gcc", "/tmp/x.c"]), "/usr/bin/gcc failed; a C compiler and Python's headers"),
        (ImportError("libcuda.so.1: cannot open shared object file"), "libcuda.so.1: cannot open"),
    ],
)
def test_what_keeps_it_from_being_built_is_the_reason(
    hopper: None, error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def fail(device: torch.device) -> None:
        calls.append(device)
        raise error

    monkeypatch.setattr(probe, "why_not_built", fail)
    for _ in range(2):
        found = str(why_not_triton(CUDA, BF16))
        assert found.startswith(f"Triton cannot build its kernels here: {reason}")
    assert calls == [CUDA]  # once a process


def test_a_wrong_result_is_a_reason_and_a_right_one_is_none(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "why_not_built", lambda device: "a kernel of it computes wrongly here")
    assert why_not_triton(CUDA, BF16) == "a kernel of it computes wrongly here"
    adapters._why_not_built.cache_clear()
    monkeypatch.setattr(probe, "why_not_built", lambda device: None)
    assert why_not_triton(CUDA, BF16) is None
    monkeypatch.setenv("QUASAR_TRITON", "0")
    assert why_not_triton(CUDA, BF16) == "QUASAR_TRITON is 0"


def test_on_an_amd_gpu_only_what_runs_there_is_tried(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton would put NVIDIA's assembly into a module for AMD, which ends the process."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(probe, "why_not_built", lambda device: pytest.fail("it was built"))
    for obstacle in (
        why_not_triton(CUDA, BF16),
        MarlinKernel().why_not(SHAPE, CUDA, BF16),
        Float8Kernel().why_not(SHAPE, CUDA, BF16),
    ):
        assert obstacle == "it is made for NVIDIA's GPUs, and this one is AMD's"
    for name, runs in (("gfx942:sramecc+:xnack-", True), ("gfx90a", True), ("gfx1100", False)):
        properties = SimpleNamespace(gcnArchName=name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        assert (CudaInt4Kernel().why_not(SHAPE, CUDA, BF16) is None) == runs
