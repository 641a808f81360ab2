"""Compile the kernels of many checks in threads before the checks run, one after the other, on the device.

Compiling takes one core, and is most of a check. Nothing is launched meanwhile, so the results are of no use.
"""

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from quasar_core.kernels.gpu import on
from quasar_core.kernels.triton.language import scratch
from tools.gpu_bench.cases import Case


@contextmanager
def compiling_only() -> Iterator[None]:
    """Launches within the context compile their kernel, and launch nothing."""
    run = JITFunction.run

    def compile_launch(self: Any, *given: Any, warmup: bool, **named: Any) -> Any:
        return run(self, *given, warmup=True, **named)

    JITFunction.run = compile_launch
    try:
        yield
    finally:
        JITFunction.run = run


def compile_ahead(cases: Sequence[Case], device: torch.device, seconds: float) -> tuple[int, int]:
    """Compile what these cases launch, in at most about so many seconds; how many were walked, and how many failed.

    A case that fails here fails again when it is run, and says why.
    """
    deadline = time.perf_counter() + seconds
    scratch(device)  # reserved once, not by several threads
    if device.type == "cuda":
        driver.active.get_current_device()  # makes the driver, which is not for several threads at once

    def walk(case: Case) -> str:
        if time.perf_counter() >= deadline:
            return "left"
        try:
            with on(device):
                case[1]()
        except Exception:  # of a compiler: the check itself tells it
            return "failed"
        return "walked"

    with compiling_only(), ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        found = list(threads.map(walk, cases))
    return len(found) - found.count("left"), found.count("failed")
