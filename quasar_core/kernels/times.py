"""Measure how long each kernel takes for a layer on this device, and keep the times: the choice among kernels.

Random codes of the layer's shape are multiplied with 1, 4 and 8 rows, as a verify does. The weights rotate through as
many copies as a model has layers of a size, or as no cache holds, whichever is less: a large model's weights come from
memory in use, a small one's from a cache. Of a large layer only some outputs are timed, and the time is scaled. Times
are kept in quasar's own folder, for this device, its threads, PyTorch and the kernels' sources.
"""

import copy
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from quasar_core.checkpoint.compressed_tensors import FLOAT8, Float8Weight, PackedWeight
from quasar_core.checkpoint.gptq_format import QuantizedWeight, count_groups, trivial_groups
from quasar_core.kernels.base import Kernel, LayerShape, TunableKernel
from quasar_core.kernels.cpu.forms import chosen
from quasar_core.kernels.gpu import first_line, on, raise_if_lost
from quasar_core.kernels.threads import most_threads
from quasar_core.records import Progress, no_progress
from quasar_core.store.measured import Measured, forget, measured_file, positive
from quasar_core.system import QUIET, processor_name
from quasar_core.timing import Sampler, Timing, time_one
from quasar_core.typed import build


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = most_threads()
    return f"{processor_name()}, {threads} thread{'s' if threads > 1 else ''}"


def measured_on(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """The conditions of a measurement: one that was made under others says nothing here."""
    conditions = {
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "kernels": sources_hash(),
    }
    return conditions if device.type == "cuda" else {**conditions, "instructions": chosen().key}


@cache
def sources_hash() -> str:
    """SHA-256 (its first 16 digits) of the sources of all kernels, so that a change of any measures anew."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".h", ".cpp")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


ROWS = (1, 4, 8)
Times = dict[int, float]  # seconds by rows
CPU = torch.device("cpu")

_LAYERS = 32  # of one size, in a small model
_UNCACHED = {"cpu": 64_000_000, "cuda": 200_000_000}  # bytes
# A GPU's product of fewer weights is over before all of its processors work.
_TIMED_WEIGHTS = {"cpu": 2**21, "cuda": 2**26}
_BLOCK = 256  # outputs that are timed are a multiple of it, whatever blocks a kernel works in
_SECONDS = 0.1  # for one number of rows, where times do not repeat sooner
_CALLS = 24  # that a GPU runs back to back
_POOL = 1_000_003  # a prime, so that no two outputs get the same codes
_SLEEP = 20_000_000  # cycles of a GPU in which the host enqueues all calls, so that launching them costs nothing


def time_kernel(
    kernel: Kernel,
    shape: LayerShape,
    device: torch.device,
    dtype: torch.dtype,
    now: Callable[[], float] = time.perf_counter,
) -> dict[int, Timing]:
    """The timing of one product, by its rows."""
    timed = _timed_part(shape, device)
    first = kernel.prepare(random_weight(timed, device), device, dtype)
    scale = shape.out_features / timed.out_features
    size = max(sum(tensor.untyped_storage().nbytes() for tensor in _tensors(first)), 1)
    copies = max(1, int(min(_LAYERS * scale * size, _UNCACHED[device.type]) // size))
    weights = [first, *(copy.deepcopy(first) for _ in range(copies - 1))]
    if isinstance(kernel, TunableKernel):
        kernel.tune(weights, dtype)
    return {rows: _time_rows(kernel, weights, _activations(rows, shape, device, dtype), scale, now) for rows in ROWS}


def random_weight(shape: LayerShape, device: torch.device = CPU) -> PackedWeight:
    """Random codes of a shape, in ordered groups, or values; zeros are the middle of the codes, or one less.

    Made on the device, where unpacking or reordering them takes no time, and of the same numbers on every device.
    """
    pool = torch.randint(2**shape.bits, (_POOL,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    count = shape.in_features * shape.out_features
    codes = pool.to(device).repeat(-(-count // _POOL))[:count].view(shape.in_features, shape.out_features)
    if shape.floating:
        values = (codes.t().contiguous() & 0b10111111).view(FLOAT8)  # no NaN, and nothing above 1.875
        return Float8Weight(values, torch.full((shape.out_features,), 0.01, device=device))
    groups = count_groups(shape.in_features, shape.group_size), shape.out_features
    return QuantizedWeight(
        shape.bits,
        shape.group_size,
        codes,
        scales=torch.full(groups, 0.01, dtype=torch.float16, device=device),
        zeros=torch.full(groups, 2 ** (shape.bits - 1) - (not shape.symmetric), dtype=torch.int32, device=device),
        g_idx=trivial_groups(shape.in_features, shape.group_size).to(device),
    )


def _timed_part(shape: LayerShape, device: torch.device) -> LayerShape:
    outputs = max(_TIMED_WEIGHTS[device.type] // shape.in_features // _BLOCK * _BLOCK, _BLOCK)
    return replace(shape, out_features=min(outputs, shape.out_features))


def _tensors(prepared: Any) -> Iterator[torch.Tensor]:
    """The tensors of a prepared weight: it is one, is a module, or has them as fields."""
    if isinstance(prepared, torch.nn.Module):
        return prepared.parameters()
    parts = [prepared] if isinstance(prepared, torch.Tensor) else vars(prepared).values()
    return (part for part in parts if isinstance(part, torch.Tensor))


def _activations(rows: int, shape: LayerShape, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(rows, shape.in_features, generator=torch.Generator().manual_seed(rows))
    return x.to(device, dtype)


def _time_rows(kernel: Kernel, weights: list[Any], x: torch.Tensor, scale: float, now: Callable[[], float]) -> Timing:
    """Time a product, after one that is not counted: the first pays for compiling and allocating."""
    kernel.multiply(x, weights[0])
    sample = _sampler_on_gpu(kernel, weights, x) if x.is_cuda else _sampler_on_cpu(kernel, weights, x, now)
    timing = time_one(lambda: scale * sample(), _SECONDS, now=now)
    return replace(timing, load=QUIET) if x.is_cuda else timing  # a busy host delays no GPU's products


def _sampler_on_cpu(kernel: Kernel, weights: list[Any], x: torch.Tensor, now: Callable[[], float]) -> Sampler:
    """One product, with the next of the weights at each call."""
    turns = itertools.cycle(weights)

    def sample() -> float:
        weight, start = next(turns), now()
        kernel.multiply(x, weight)
        return now() - start

    return sample


def _sampler_on_gpu(kernel: Kernel, weights: list[Any], x: torch.Tensor) -> Sampler:
    """The mean of calls that the GPU runs back to back, as it runs those of a graph."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    calls = [weights[number % len(weights)] for number in range(max(_CALLS, len(weights)))]

    def sample() -> float:
        torch.cuda._sleep(_SLEEP)
        start.record()
        for weight in calls:
            kernel.multiply(x, weight)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000 / len(calls)

    return sample


KIND = "kernels"


@dataclass(frozen=True)
class KernelFigures:
    """Seconds of kernels for a shape, by their names and by rows.

    `guesses` are the kernels whose times did not repeat. `trouble` says why times were not read from the file, or are
    not kept in it. Of kernels that `failed` there are no times.
    """

    seconds: dict[str, Times]
    guesses: frozenset[str] = frozenset()
    trouble: str | None = None
    failed: Mapping[str, str] = field(default_factory=dict)  # kernels that failed while they were measured, and how


@dataclass
class KernelTimes:
    """Times by shape and kernel, on one device in one dtype: those of earlier runs, and of this one."""

    device: torch.device
    dtype: torch.dtype
    kept: Measured[Times]
    _unkept: dict[str, dict[int, Timing]] = field(default_factory=dict)  # of this run alone
    _failed: dict[str, str] = field(default_factory=dict)  # the reasons, of this run

    def of(self, kernels: Sequence[Kernel], shape: LayerShape, progress: Progress = no_progress) -> KernelFigures:
        """The times of each kernel; those that are not known are measured, and kept where nothing disturbed that.

        A kernel that fails meanwhile is told among those that `failed`, in this run; the next one tries it again.
        """
        names = {kernel: f"{shape_key(shape)} on {kernel.name}" for kernel in kernels}
        missing = [kernel for kernel in kernels if not self._knows(names[kernel])]
        new: dict[str, Times] = {}
        for done, kernel in enumerate(missing):
            progress("measuring kernels", done, len(missing))
            timings = self._measure(kernel, shape, names[kernel])
            if timings and not any(timing.trouble for timing in timings.values()):
                new[names[kernel]] = _seconds(timings)
        if missing:
            progress("measuring kernels", len(missing), len(missing))
        if new:
            self.kept.keep(new)
        timed = [kernel for kernel in kernels if names[kernel] not in self._failed]
        return KernelFigures(
            {kernel.name: self._seconds_of(names[kernel]) for kernel in timed},
            frozenset(kernel.name for kernel in timed if not self._is_reliable(names[kernel])),
            self.kept.trouble or self._why_not_kept([names[kernel] for kernel in timed]),
            {kernel.name: self._failed[names[kernel]] for kernel in kernels if kernel not in timed},
        )

    def _measure(self, kernel: Kernel, shape: LayerShape, name: str) -> dict[int, Timing]:
        """Time it and remember that for this run; nothing where it fails, whatever the library behind it raises."""
        try:
            with on(self.device):
                self._unkept[name] = time_kernel(kernel, shape, self.device, self.dtype)
        except Exception as error:
            raise_if_lost(error)
            self._failed[name] = first_line(error)
            return {}
        return self._unkept[name]

    def _knows(self, name: str) -> bool:
        return name in self._unkept or name in self._failed or self.kept.get(name) is not None

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
    """A key such as 1024x4096-4bit-g128; codes with zeros, and float8 values, have keys of their own."""
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
