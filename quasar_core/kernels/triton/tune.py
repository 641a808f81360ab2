"""The best block shapes of a product, measured: graph replays over weights that no cache holds."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from quasar_core.errors import QuasarError
from quasar_core.kernels.triton.blocks import (
    Blocks,
    dense_blocks,
    dense_key,
    even_splits,
    packed_blocks,
    packed_key,
)
from quasar_core.kernels.triton.eight_bit import LARGEST, multiply_w8a8
from quasar_core.kernels.triton.products import multiply_dense, multiply_packed
from quasar_core.kernels.triton.scratch import scratch
from quasar_core.kernels.triton.tuned import keep_tuned, tuned_blocks
from quasar_core.kernels.triton.weights import BLOCK, TritonWeight
from quasar_core.records import Progress, no_progress

Weight = TritonWeight | torch.Tensor  # packed codes; values [out, in] of 16 bits, or of 8, whose rows have 8 too
Timer = Callable[[Callable[[], None]], float]
_TUNED_ROWS = 8  # a row's result must not depend on T, so one shape serves all T
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
_REPLAYS = 10
_UNCACHED = 200_000_000  # bytes of weights that are multiplied in turn
SECONDS = 6.0  # for all products of a model: most of it is spent on compiling candidates


def tune_missing(
    weights: Iterable[Weight],
    dtype: torch.dtype,
    timer: Timer | None = None,
    seconds: float = SECONDS,
    progress: Progress = no_progress,
) -> str:
    """Tune every shape among the weights that has not been on this device; what was done, or "" for no weights.

    Each shape may take its share of the seconds that are left. What cannot be kept on disk is used in this process.
    """
    groups: dict[str, list[Weight]] = {}
    for weight in weights:
        groups.setdefault(_key(weight), []).append(weight)
    missing = [group for key, group in groups.items() if tuned_blocks(_device(group[0]), key) is None]
    begin, trouble = time.perf_counter(), ""
    for done, group in enumerate(missing):
        progress("tuning kernels", done, len(missing))
        share = (begin + seconds - time.perf_counter()) / (len(missing) - done)
        try:
            tune(_uncached(group), dtype, timer, share)
        except QuasarError as error:
            trouble = f", not kept: {error}"
    if missing:
        progress("tuning kernels", len(missing), len(missing))
    return _summary(len(missing), len(groups) - len(missing), time.perf_counter() - begin) + trouble


def _summary(tuned: int, remembered: int, seconds: float) -> str:
    parts = [f"{tuned} tuned in {seconds:.1f} s"] if tuned else []
    parts += [f"{remembered} remembered"] if remembered else []
    return f"block shapes of Triton's products: {', '.join(parts)}" if parts else ""


def tune(
    weights: Sequence[Weight], dtype: torch.dtype, timer: Timer | None = None, seconds: float = math.inf
) -> Blocks:
    """Measure the candidates for weights of one shape and keep the fastest for this device; in so many seconds.

    Give so many weights that they exceed the GPU's cache together (100 MB will do). `timer` takes a function that
    launches kernels and returns how long they take; the least is the best. The rule of thumb is always measured.
    """
    first, deadline = weights[0], time.perf_counter() + seconds
    multiply = _product(first, dtype)

    def seconds_of(blocks: Blocks) -> float:
        def launch() -> None:
            for weight in weights:
                multiply(weight, blocks)

        try:
            return (timer or replay_seconds)(launch)
        except OutOfResources:  # of shared memory or registers, which a GPU has less of than another
            return math.inf

    best, least = None, math.inf
    for blocks in candidates(first):
        if best is not None and time.perf_counter() >= deadline:
            break
        measured = seconds_of(blocks)
        if best is None or measured < least:
            best, least = blocks, measured
    assert best is not None  # the rule of thumb's is always there
    keep_tuned(_device(first), {_key(first): asdict(best)})
    return best


def _product(first: Weight, dtype: torch.dtype) -> Callable[[Any, Blocks], None]:
    """The product that weights of the first one's kind are for, with rows and outputs of its own."""
    device, (in_features, out_features) = _device(first), _sizes(first)
    x = torch.randn(_TUNED_ROWS, in_features, device=device, dtype=dtype)
    out = torch.empty(_TUNED_ROWS, out_features, device=device, dtype=dtype)
    if isinstance(first, TritonWeight):
        return lambda weight, blocks: multiply_packed(x, weight, out, blocks=blocks)
    if first.dtype not in LARGEST:
        return lambda weight, blocks: multiply_dense(x, weight, out, blocks=blocks)
    codes = (20 * x.float()).clamp(-127, 127).to(first.dtype)
    steps, scales = torch.ones(_TUNED_ROWS, device=device), torch.ones(out_features, device=device)
    return lambda weight, blocks: multiply_w8a8(codes, steps, weight, scales, out, blocks=blocks)


def candidates(weight: Weight) -> list[Blocks]:
    """Block shapes worth measuring: the rule of thumb's first, then those that differ from it least."""
    in_features, out_features = _sizes(weight)
    if isinstance(weight, TritonWeight):
        rule, device = packed_blocks(weight, weight.words.device), weight.words.device
        inputs = [rule.inputs]
    else:
        rule, device = dense_blocks(weight, weight.device), weight.device
        inputs = [rule.inputs // 2, rule.inputs, 2 * rule.inputs]
    space = scratch(device)
    found = [rule]
    for outputs in (BLOCK, 2 * BLOCK):
        blocks = -(-out_features // outputs)
        for depth in inputs:
            steps = -(-in_features // depth)
            for splits in _SPLITS:
                has_room = splits == 1 or space.fits(splits, 16 * out_features, blocks)
                if has_room and splits == even_splits(steps, splits):
                    found += [Blocks(outputs, depth, splits, stages) for stages in (2, 3, 4)]
    return sorted(dict.fromkeys(found), key=lambda blocks: _distance(blocks, rule))


def _distance(blocks: Blocks, rule: Blocks) -> float:
    """How far a shape is from another: doublings of what a program reads, and of the programs; stages count half."""
    sizes = ((blocks.outputs, rule.outputs), (blocks.inputs, rule.inputs), (blocks.splits, rule.splits))
    return sum(abs(math.log2(own / other)) for own, other in sizes) + abs(blocks.stages - rule.stages) / 2


def replay_seconds(launch: Callable[[], None]) -> float:
    """Of one run of `launch` on the device: the fastest of a few replays of its graph."""
    launch()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    times: list[float] = []
    for _ in range(_REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times)


def _sizes(weight: Weight) -> tuple[int, int]:
    if isinstance(weight, TritonWeight):
        return weight.in_features, weight.out_features
    return weight.shape[1], weight.shape[0]


def _uncached(weights: Sequence[Weight]) -> Sequence[Weight]:
    """The first of them that no cache holds together; all where they are fewer."""
    first = weights[0]
    tensor = first.words if isinstance(first, TritonWeight) else first
    return weights[: -(-_UNCACHED // (tensor.numel() * tensor.element_size()))]


def _device(weight: Weight) -> torch.device:
    return weight.words.device if isinstance(weight, TritonWeight) else weight.device


def _key(weight: Weight) -> str:
    return packed_key(weight) if isinstance(weight, TritonWeight) else dense_key(weight)
