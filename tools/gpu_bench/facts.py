"""The first part of a GPU bench, in seconds: what floors and estimates are held against."""

import shutil
import time
from collections.abc import Callable
from functools import partial

import torch

from quasar_core.models.cuda.graphs import record
from quasar_core.models.cuda.products import time_replay
from tools.gpu_bench.models import Bench, Plan
from tools.gpu_bench.passes import time_pass

PART = "facts"
BYTES = {"cuda": 4 << 30, "cpu": 1 << 24}
REPEATS = 10
LAUNCHES = 400
TOOLS = ("nvcc", "gcc", "cc", "ptxas", "ncu")


def run(bench: Bench) -> None:
    """Compilers at hand; bandwidth by copying and by reading; what a launch within a graph costs; a message's way."""
    report = bench.report
    report.add(PART, tools={name: shutil.which(name) for name in TOOLS}, **device_facts(bench.plan))
    for name, measure in {"copy": time_copy, "read": time_read, "launches": time_launches, "mail": time_mail}.items():
        report.attempt(PART, name, partial(measure, bench))


def device_facts(plan: Plan) -> dict[str, object]:
    """What the driver says of the device."""
    if plan.device.type != "cuda":
        return {}
    found = torch.cuda.get_device_properties(plan.device)
    names = ("name", "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size")
    return {name: getattr(found, name, None) for name in names}


def time_copy(bench: Bench) -> None:
    """Bytes read and written ÷ seconds of a copy within the device."""
    source = torch.zeros(BYTES[bench.plan.device.type] // 2, dtype=torch.uint8, device=bench.plan.device)
    place = torch.empty_like(source)
    _add_rate(bench, "copy", 2 * source.nbytes, lambda: place.copy_(source))


def time_read(bench: Bench) -> None:
    """Bytes ÷ seconds of a sum, which writes next to nothing: nearer to what a product of few rows does."""
    source = torch.zeros(BYTES[bench.plan.device.type] // 4, dtype=torch.int32, device=bench.plan.device)
    _add_rate(bench, "read", source.nbytes, lambda: source.sum())


def _add_rate(bench: Bench, what: str, size: int, work: Callable[[], object]) -> None:
    work()
    seconds = min(time_pass(work, bench.plan.device)[1] for _ in range(REPEATS))
    bench.report.add(PART, what=f"bandwidth, {what}", bytes=size, seconds=seconds, gb_per_s=size / seconds / 1e9)


def time_launches(bench: Bench) -> None:
    """µs of each of many small kernels in a graph, one after the other."""
    word = torch.zeros(32, device=bench.plan.device)

    def launch() -> None:
        for _ in range(LAUNCHES):
            word.add_(1)

    launch()
    if bench.plan.device.type == "cuda":
        graph = record(launch, bench.plan.device)
        seconds = min(time_replay(graph) for _ in range(REPEATS))
    else:
        seconds = time_pass(launch, bench.plan.device)[0]
    bench.report.add(PART, what="a launch in a graph", us=1e6 * seconds / LAUNCHES)


def time_mail(bench: Bench) -> None:
    """µs from the host's copy to the device until the copy back is there, the least of many."""
    device, on_cuda = bench.plan.device, bench.plan.device.type == "cuda"
    there, here = (torch.zeros(64, dtype=torch.int64, pin_memory=on_cuda) for _ in "ab")
    word, times = torch.zeros(64, dtype=torch.int64, device=device), []
    for _ in range(50):
        start = time.perf_counter()
        word.copy_(there, non_blocking=True)
        here.copy_(word)
        times.append(time.perf_counter() - start)
    bench.report.add(PART, what="a message there and back", us=1e6 * min(times))
