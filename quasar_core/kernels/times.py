"""The times of kernels that were measured on this machine, kept in quasar's own folder: each layer's shape once."""

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from quasar_core.errors import QuasarError
from quasar_core.files import read_json_if_there, write_json
from quasar_core.foreign import foreign_errors
from quasar_core.kernels.base import Kernel, LayerShape
from quasar_core.kernels.identity import measured_on
from quasar_core.kernels.measure import ROWS, Times, time_kernel
from quasar_core.records import Progress, no_progress
from quasar_core.store.home import home
from quasar_core.typed import build


class KernelTimes:
    """Times by shape and kernel, on one device in one dtype.

    `trouble` says in a sentence why they were not read from the file, or are not kept in it.
    """

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.path, self.device, self.dtype = path, device, dtype
        self.trouble: str | None = None
        self._times: dict[str, dict[str, Times]] = {}
        try:
            self._times = _parse(path, read_json_if_there(path))
        except QuasarError as error:
            self.trouble = f"measured anew: {error}"

    def of(self, kernels: Sequence[Kernel], shape: LayerShape, progress: Progress = no_progress) -> dict[str, Times]:
        """The times of each kernel by its name; those that are not known are measured and kept."""
        known = self._times.setdefault(shape_key(shape), {})
        missing = [kernel for kernel in kernels if kernel.name not in known]
        for done, kernel in enumerate(missing):
            progress("measuring kernels", done, len(missing))
            known[kernel.name] = time_kernel(kernel, shape, self.device, self.dtype)
        if missing:
            progress("measuring kernels", len(missing), len(missing))
            self._keep()
        return {kernel.name: known[kernel.name] for kernel in kernels}

    def _keep(self) -> None:
        try:
            write_json(self.path, {"measured_on": measured_on(self.device, self.dtype), "seconds": self._times})
        except QuasarError as error:
            self.trouble = f"not kept: {error}"


def kernel_times(device: torch.device, dtype: torch.dtype) -> KernelTimes:
    """The times of a device in a dtype, those of earlier runs included."""
    conditions = json.dumps(measured_on(device, dtype), sort_keys=True)
    key = hashlib.sha256(conditions.encode()).hexdigest()[:16]
    return _opened(home() / "kernels" / f"times-{key}.json", device, dtype)


def forget_times() -> None:
    """Measure everything anew, on every device."""
    for path in (home() / "kernels").glob("times-*.json"):
        with foreign_errors(f"{path} cannot be removed"):
            path.unlink()
    _opened.cache_clear()


def shape_key(shape: LayerShape) -> str:
    """Such as 1024x4096-4bit-g128; codes with zeros of their own are a shape of their own, and so are float8 values."""
    kind = ("" if shape.symmetric else "-asymmetric") + "-floating" * shape.floating
    return f"{shape.in_features}x{shape.out_features}-{shape.bits}bit-g{shape.group_size}{kind}"


@cache
def _opened(path: Path, device: torch.device, dtype: torch.dtype) -> KernelTimes:
    return KernelTimes(path, device, dtype)


def _parse(path: Path, content: dict[str, Any] | None) -> dict[str, dict[str, Times]]:
    """QuasarError where the file does not hold a positive time for all rows."""
    if content is None:
        return {}
    try:
        stored = build(dict[str, dict[str, dict[str, float]]], content.get("seconds"), "seconds")
        return {
            shape: {name: {rows: _positive(times[str(rows)]) for rows in ROWS} for name, times in kernels.items()}
            for shape, kernels in stored.items()
        }
    except (KeyError, ValueError) as error:
        raise QuasarError(f"{path} is damaged.") from error


def _positive(seconds: float) -> float:
    if not 0 < float(seconds) < float("inf"):
        raise ValueError(f"{seconds} is no time")
    return float(seconds)
