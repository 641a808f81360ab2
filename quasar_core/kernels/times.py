"""The times of kernels that were measured on this machine, kept in quasar's own folder: each layer's shape once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from quasar_core.kernels.base import Kernel, LayerShape
from quasar_core.kernels.identity import measured_on
from quasar_core.kernels.measure import ROWS, Times, time_kernel
from quasar_core.records import Progress, no_progress
from quasar_core.store.measured import Measured, forget, measured_file, positive
from quasar_core.timing import Timing
from quasar_core.typed import build

KIND = "kernels"


@dataclass(frozen=True)
class KernelFigures:
    """Seconds of kernels for a shape, by their names and by rows.

    `guesses` are the kernels whose times did not repeat. `trouble` says why times were not read from the file, or are
    not kept in it.
    """

    seconds: dict[str, Times]
    guesses: frozenset[str] = frozenset()
    trouble: str | None = None


@dataclass
class KernelTimes:
    """Times by shape and kernel, on one device in one dtype: those of earlier runs, and of this one."""

    device: torch.device
    dtype: torch.dtype
    kept: Measured[Times]
    _unkept: dict[str, dict[int, Timing]] = field(default_factory=dict)  # of this run alone

    def of(self, kernels: Sequence[Kernel], shape: LayerShape, progress: Progress = no_progress) -> KernelFigures:
        """The times of each kernel; those that are not known are measured, and kept where nothing disturbed that."""
        names = {kernel: f"{shape_key(shape)} on {kernel.name}" for kernel in kernels}
        missing = [kernel for kernel in kernels if not self._knows(names[kernel])]
        new: dict[str, Times] = {}
        for done, kernel in enumerate(missing):
            progress("measuring kernels", done, len(missing))
            timings = time_kernel(kernel, shape, self.device, self.dtype)
            self._unkept[names[kernel]] = timings
            if not any(timing.trouble for timing in timings.values()):
                new[names[kernel]] = _seconds(timings)
        if missing:
            progress("measuring kernels", len(missing), len(missing))
        if new:
            self.kept.keep(new)
        return KernelFigures(
            {kernel.name: self._seconds_of(names[kernel]) for kernel in kernels},
            frozenset(kernel.name for kernel in kernels if not self._is_reliable(names[kernel])),
            self.kept.trouble or self._why_not_kept(list(names.values())),
        )

    def _knows(self, name: str) -> bool:
        return name in self._unkept or self.kept.get(name) is not None

    def _seconds_of(self, name: str) -> Times:
        known = self.kept.get(name)
        return known.value if known else _seconds(self._unkept[name])

    def _is_reliable(self, name: str) -> bool:
        return self.kept.get(name) is not None or all(timing.is_reliable for timing in self._unkept[name].values())

    def _why_not_kept(self, names: Sequence[str]) -> str | None:
        timings = [timing for name in names if not self.kept.get(name) for timing in self._unkept[name].values()]
        trouble = next((timing.trouble for timing in timings if timing.trouble), None)
        return f"not kept, as {trouble}" if trouble else None


def kernel_times(device: torch.device, dtype: torch.dtype) -> KernelTimes:
    """The times of a device in a dtype, those of earlier runs included."""
    return _opened(measured_file(KIND, measured_on(device, dtype)), device, dtype)


def forget_times() -> None:
    """Measure everything anew, on every device."""
    forget(KIND)
    _opened.cache_clear()


def shape_key(shape: LayerShape) -> str:
    """Such as 1024x4096-4bit-g128; codes with zeros of their own are a shape of their own, and so are float8 values."""
    kind = ("" if shape.symmetric else "-asymmetric") + "-floating" * shape.floating
    return f"{shape.in_features}x{shape.out_features}-{shape.bits}bit-g{shape.group_size}{kind}"


@cache
def _opened(path: Path, device: torch.device, dtype: torch.dtype) -> KernelTimes:
    return KernelTimes(device, dtype, Measured(path, measured_on(device, dtype), _parse))


def _seconds(timings: dict[int, Timing]) -> Times:
    return {rows: timing.seconds for rows, timing in timings.items()}


def _parse(content: Any) -> Times:
    """A positive time for all rows."""
    times = build(dict[str, float], content)
    return {rows: positive(times[str(rows)]) for rows in ROWS}
