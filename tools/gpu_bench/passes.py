"""Part 2 of a GPU bench: what a pass of T tokens takes, against the bytes it reads ÷ the bandwidth of this device."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

import torch

from quasar_core.bench.steps import cache_bytes, lean_candidate
from quasar_core.decode.engine import PREFILL_CHUNK
from quasar_core.models.cuda.choose import choose_steps
from quasar_core.models.cuda.graph_pass import CudaPass, pass_size
from quasar_core.models.cuda.graphs import PlainLauncher
from quasar_core.models.decoder.cache import DecoderCache
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.timing import time_one
from tools.gpu_bench.models import Bench, rounded_verifier, with_fast_pass, with_head_of

PART, LAUNCHES = "passes", "launches"
COUNTED_TOKENS = (1, 8)  # of the passes whose launches are counted
NAMED_KERNELS = 14  # of a pass, those that take longest
ROOM = 64


def run(bench: Bench, target: LeanDecoder, make_verifier: Callable[[], LeanDecoder]) -> None:
    """Target and 4-bit verifier at every length and context, then verifiers of other kinds."""
    plan, report = bench.plan, bench.report
    cache = target.new_cache(max(plan.contexts) + ROOM)
    report.attempt(PART, "prompt", partial(fill, bench, target, cache, max(plan.contexts)))
    few = (1, 8) if 8 in plan.tokens else plan.tokens[-1:]
    models: dict[str, tuple[Callable[[], LeanDecoder], Sequence[int]]] = {
        "target": (lambda: target, plan.tokens),
        "4-bit": (make_verifier, plan.tokens),
        "target, fast": (lambda: with_fast_pass(copy(target), fast=True), plan.tokens),
        "4-bit, fast": (lambda: with_fast_pass(copy(make_verifier()), fast=True), plan.tokens),
        "4-bit, head 8": (lambda: with_head_of(8, make_verifier(), target), few),
        "4-bit, head 4": (lambda: with_head_of(4, make_verifier(), target), few),
        "w8a16": (partial(rounded_verifier, target, "w8a16"), few),
        "w8a8": (partial(rounded_verifier, target, "w8a8"), few),
        "fp8": (partial(rounded_verifier, target, "fp8"), few),
    }
    for name, (make, tokens) in models.items():
        report.attempt(PART, name, lambda: time_model(bench, name, make(), cache, tokens))  # noqa: B023 (called at once)


def run_launches(bench: Bench, target: LeanDecoder, verifier: LeanDecoder) -> None:
    """Which kernels a pass launches. After all that is timed: a profiler that was used once may cost time later."""
    cache = target.new_cache(max(bench.plan.contexts) + ROOM)
    for name, model in {"target": target, "4-bit": verifier}.items():
        bench.report.attempt(LAUNCHES, name, partial(count_launches, bench, name, model, cache))


def fill(bench: Bench, target: LeanDecoder, cache: DecoderCache, length: int) -> None:
    """Run a prompt of random tokens, and time it: twice, as the first one pays for what is made once."""
    tokens, device = random_tokens(length), bench.plan.device
    chunk = PREFILL_CHUNK[device.type]
    for _ in range(2):
        cache.rollback(0)
        start = time.perf_counter()
        for begin in range(0, length, chunk):
            target.forward(tokens[begin : begin + chunk], cache, last_only=True)
        synchronize(device)
        seconds = time.perf_counter() - start
    bench.report.add(PART, what="prompt", tokens=length, chunk=chunk, seconds=seconds, tokens_per_s=length / seconds)


def time_model(bench: Bench, name: str, model: LeanDecoder, cache: DecoderCache, tokens: Sequence[int]) -> None:
    """A model's passes at every context; first how they were chosen."""
    packed = list(model.packed_layers)
    kernels = list(dict.fromkeys(f"{layer.choice.kernel.name}: {layer.choice.reason}" for layer in packed))
    bench.report.add(PART, model=name, note=getattr(model.fast, "note", ""), kernels=kernels)
    for context in bench.plan.contexts:
        for count in tokens:
            what = f"{name}, {count} tokens at {context}"
            bench.report.attempt(PART, what, partial(time_length, bench, name, model, cache, count, context))


def time_length(
    bench: Bench,
    name: str,
    model: LeanDecoder,
    cache: DecoderCache,
    count: int,
    context: int,
    part: str = PART,
    weight_bytes: int | None = None,
) -> None:
    """The median of repeated passes: of the host's clock until the choices are there, and of the device's own.

    `weight_bytes` are what a pass reads of the weights, where that is not all of them.
    """
    candidate, tokens = lean_candidate(model), random_tokens(count)
    device: list[float] = []

    def sample() -> float:
        stand_at(cache, context)
        host_s, device_s = time_pass(partial(model.choose, tokens, cache), bench.plan.device)
        device.append(device_s)
        return host_s

    timing = time_one(sample, rounds=bench.plan.rounds, warm_up=True)  # the first one records the graph
    weights = candidate.weight_bytes if weight_bytes is None else weight_bytes
    size = weights + cache_bytes(model.config, context + count, model.dtype.itemsize)
    ms, device_ms = 1000 * timing.median, 1000 * statistics.median(device[1:])
    floor = 1000 * size / bench.bandwidth
    bench.report.add(
        part,
        model=name,
        tokens=count,
        context=context,
        ms=ms,
        device_ms=device_ms,
        floor_ms=floor,
        ratio=ms / floor,
        bytes=size,
        kernel=candidate.kernel,
        dense=dense_choices(model, count),
    )


def stand_at(cache: DecoderCache, length: int) -> None:
    """Move the length there; what the positions hold is no matter."""
    cache.rollback(0)
    cache.advance(length)


def time_pass(run: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds by the host's clock, and by the device's."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start,) * 2
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return time.perf_counter() - start, begin.elapsed_time(end) / 1000


def dense_choices(model: LeanDecoder, count: int) -> dict[str, Any]:
    """How each shape of 16-bit weights and the gate run at this length, and the µs that each way took."""
    if not isinstance(model.fast, CudaPass):
        return {}
    found, size = model.fast.dense, pass_size(count, model.fast.longest)
    products = {
        f"{shape[1]} → {shape[0]}": {"by": way, **in_us(found.seconds.get((shape, rows), {}))}
        for (shape, rows), way in found.chosen.items()
        if rows == size
    }
    gates = {
        f"gate, {kind}": {"by": way, **in_us(found.gate_seconds.get((kind, rows), {}))}
        for (kind, rows), way in found.chosen_gates.items()
        if rows == size
    }
    return products | gates


def in_us(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds by name, in µs."""
    return {name: 1e6 * value for name, value in seconds.items()}


def count_launches(bench: Bench, name: str, model: LeanDecoder, cache: DecoderCache) -> None:
    """Kernels of one pass that is not recorded, and those that take longest, as PyTorch's profiler sees them."""
    plan, report = bench.plan, bench.report
    if not isinstance(model.fast, CudaPass):
        report.add(LAUNCHES, what=name, skipped="its passes are not recorded")
        return
    # Launches one after the other: of those that overlap, the time that each waits would count.
    plain = CudaPass(model, choose_steps(plan.device, plan.dtype)[0], PlainLauncher())
    plain.dense = model.fast.dense
    on_cuda = plan.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_cuda else torch.profiler.ProfilerActivity.CPU
    for count in [count for count in COUNTED_TOKENS if count in plan.tokens]:
        stand_at(cache, min(plan.contexts))
        with torch.profiler.profile(activities=[activity]) as profile:
            plain.run(random_tokens(count), cache)
            synchronize(plan.device)
        found = [
            (event.self_device_time_total if on_cuda else event.self_cpu_time_total, event.count, event.key)
            for event in profile.key_averages()
            if str(event.device_type).endswith("CUDA") == on_cuda  # not what the host did to launch them
        ]
        longest = sorted(found, reverse=True)[:NAMED_KERNELS]
        report.add(
            LAUNCHES,
            model=name,
            tokens=count,
            launches=sum(number for _, number, _ in found),
            busy_us=sum(time for time, _, _ in found),
            longest=[{"kernel": key[:90], "launches": number, "us": time} for time, number, key in longest],
        )


def random_tokens(count: int) -> list[int]:
    """Tokens of the demo model's vocabulary."""
    return torch.randint(3, 2048, (count,), generator=torch.Generator().manual_seed(count)).tolist()


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
