"""Measure the best block shapes of a product, by graph replays over weights that no cache holds."""

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from triton.runtime import driver

from quasar_core.errors import QuasarError
from quasar_core.kernels.gpu import first_line, on, raise_if_lost
from quasar_core.kernels.triton.blocks import (
    Blocks,
    dense_blocks,
    dense_key,
    even_splits,
    keep_tuned,
    packed_blocks,
    packed_key,
    trouble_with_file,
    tuned_blocks,
)
from quasar_core.kernels.triton.eight_bit import LARGEST, multiply_w8a8
from quasar_core.kernels.triton.language import scratch
from quasar_core.kernels.triton.packed import LONGEST, multiply_packed
from quasar_core.kernels.triton.products import LONGEST_DENSE, multiply_dense
from quasar_core.kernels.triton.weights import BLOCK, TritonWeight
from quasar_core.records import Progress, no_progress
from quasar_core.timing import time_one

Plain = TritonWeight | torch.Tensor  # packed codes; values [out, in] of 16 bits, or of 8, whose rows have 8 too
Timer = Callable[[Callable[[], None]], float]
_TUNED_ROWS = 8  # a row's result must not depend on T, so one shape serves all T
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
_REPLAYS = 10
_UNCACHED = 200_000_000  # bytes of weights that are multiplied in turn
_AT_ONCE = 8  # candidates that are compiled at once, each in a thread
SWITCH = "QUASAR_TUNE"  # a variable that is 0 where the rule of thumb's shapes will do
SECONDS = 8.0  # for all products of a model: most of it is spent on compiling candidates
_MOST_SECONDS = 2.0  # for one of them


@dataclass(frozen=True)
class GatedWeight:
    """Gates and what they gate, of a product that ends with the gate: its block shapes are its own."""

    plain: Plain


Weight = Plain | GatedWeight


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
    if missing and os.environ.get(SWITCH) == "0":
        return f"block shapes of Triton's products: a rule of thumb's for {len(missing)}, as {SWITCH} is 0"
    begin = time.perf_counter()
    for done, group in enumerate(missing):
        progress("tuning kernels", done, len(missing))
        share = (begin + seconds - time.perf_counter()) / (len(missing) - done)
        with on(_device(group[0])):
            tune(_uncached(group), dtype, timer, min(share, _MOST_SECONDS))
    if missing:
        progress("tuning kernels", len(missing), len(missing))
    trouble = trouble_with_file(_device(missing[0][0])) if missing else None
    summary = _summary(len(missing), len(groups) - len(missing), time.perf_counter() - begin)
    return f"{summary}, {trouble}" if trouble else summary


def _summary(tuned: int, remembered: int, seconds: float) -> str:
    parts = [f"{tuned} tuned in {seconds:.1f} s"] if tuned else []
    parts += [f"{remembered} remembered"] if remembered else []
    return f"block shapes of Triton's products: {', '.join(parts)}" if parts else ""


def tune(
    weights: Sequence[Weight], dtype: torch.dtype, timer: Timer | None = None, seconds: float = math.inf
) -> Blocks:
    """Measure the candidates for weights of one shape and keep the fastest for this device; in so many seconds.

    Give so many weights that they exceed the GPU's cache together (100 MB will do). `timer` takes a function that
    launches kernels and returns how long they take; the least is the best. The rule of thumb is always measured. A
    candidate that fails is passed over; QuasarError with the rule of thumb's reason where all that were tried fail.
    """
    first, deadline = weights[0], time.perf_counter() + seconds
    multiply = _product(first, dtype)
    best, least, failures = None, math.inf, dict[Blocks, str]()
    for number, blocks in enumerate(shapes := candidates(first)):
        if number and time.perf_counter() >= deadline:
            break
        if timer is None and number % _AT_ONCE == 0:
            failures |= _compile(first, dtype, shapes[number : number + _AT_ONCE])
        if blocks in failures:
            continue
        try:
            measured = (timer or replay_seconds)(lambda: _multiply_all(multiply, weights, blocks))  # noqa: B023
        except Exception as error:  # too little shared memory, or whatever a compiler does not like
            raise_if_lost(error)
            failures[blocks] = first_line(error)
            continue
        if best is None or measured < least:
            best, least = blocks, measured
    if best is None:
        raise QuasarError(f"Triton's product {_key(first)} fails in every block shape: {failures[shapes[0]]}.")
    keep_tuned(_device(first), {_key(first): asdict(best)})
    return best


def _multiply_all(multiply: Callable[[Weight, Blocks], None], weights: Sequence[Weight], blocks: Blocks) -> None:
    for weight in weights:
        multiply(weight, blocks)


def _compile(first: Weight, dtype: torch.dtype, shapes: Sequence[Blocks]) -> dict[Blocks, str]:
    """Run products of these shapes once, in threads; which of them fail, and how.

    Compiling is most of the work, and takes one core of many. A shape must do for as many rows as there may be.
    """
    products = [_product(first, dtype, rows) for rows in (_TUNED_ROWS, *_other_rows(first))]

    def run(blocks: Blocks) -> str | None:
        torch.cuda.set_device(_device(first))
        try:
            for multiply in products:
                multiply(first, blocks)
        except Exception as error:
            raise_if_lost(error)
            return first_line(error)
        return None

    driver.active.get_current_device()  # makes the driver, which is not for several threads at once
    with ThreadPoolExecutor(min(len(shapes), os.cpu_count() or 1)) as threads:
        found = zip(shapes, threads.map(run, shapes), strict=True)
        return {blocks: error for blocks, error in found if error}


def _other_rows(first: Weight) -> tuple[int, ...]:
    """The rows of the second kernel, where a product has one for few rows and one for more."""
    plain = _plain(first)
    if isinstance(plain, TritonWeight):
        return (LONGEST,)
    return () if plain.dtype in LARGEST else (LONGEST_DENSE,)


def _product(first: Weight, dtype: torch.dtype, rows: int = _TUNED_ROWS) -> Callable[[Any, Blocks], None]:
    """The product that weights of the first one's kind are for, with rows and outputs of its own."""
    device, (in_features, out_features) = _device(first), _sizes(first)
    x = torch.randn(rows, in_features, device=device, dtype=dtype)
    out = torch.empty(rows, out_features, device=device, dtype=dtype)
    if isinstance(first, GatedWeight):
        half, product = out[:, : out_features // 2].contiguous(), _bits_product(first.plain)
        return lambda weight, blocks: product(x, weight.plain, half, blocks=blocks, gated=True)
    if isinstance(first, TritonWeight) or first.dtype not in LARGEST:
        product = _bits_product(first)
        return lambda weight, blocks: product(x, weight, out, blocks=blocks)
    codes = (20 * x.float()).clamp(-127, 127).to(first.dtype)
    steps, scales = torch.ones(rows, device=device), torch.ones(out_features, device=device)
    return lambda weight, blocks: multiply_w8a8(codes, steps, weight, scales, out, blocks=blocks)


def _bits_product(weight: Plain) -> Callable[..., None]:
    """On packed codes, or on 16 bits."""
    return multiply_packed if isinstance(weight, TritonWeight) else multiply_dense


def candidates(weight: Weight) -> list[Blocks]:
    """Block shapes worth measuring: the rule of thumb's first, then those that differ from it least."""
    (in_features, out_features), device = _sizes(weight), _device(weight)
    plain, gated = _plain(weight), isinstance(weight, GatedWeight)
    if isinstance(plain, TritonWeight):
        rule = packed_blocks(plain, device, gated)
        inputs = [rule.inputs]
    else:
        rule = dense_blocks(plain, device, gated)
        inputs = [rule.inputs // 2, rule.inputs, 2 * rule.inputs]
    space = scratch(device)
    found = [rule]
    for outputs in (2 * BLOCK,) if gated else (BLOCK, 2 * BLOCK):
        blocks = -(-out_features // outputs)
        for depth in inputs:
            steps = -(-in_features // depth)
            for splits in _SPLITS:
                has_room = splits == 1 or space.fits(splits, LONGEST_DENSE * out_features, blocks)
                if has_room and splits == even_splits(steps, splits):
                    found += [Blocks(outputs, depth, splits, stages) for stages in (2, 3, 4)]
    return sorted(dict.fromkeys(found), key=lambda blocks: _distance(blocks, rule))


def _distance(blocks: Blocks, rule: Blocks) -> float:
    """How far a shape is from another: doublings of what a program reads, and of the programs; stages count half."""
    sizes = ((blocks.outputs, rule.outputs), (blocks.inputs, rule.inputs), (blocks.splits, rule.splits))
    return sum(abs(math.log2(own / other)) for own, other in sizes) + abs(blocks.stages - rule.stages) / 2


def replay_seconds(launch: Callable[[], None]) -> float:
    """Seconds of one run of `launch` on the device: the fastest of a few replays of its graph."""
    launch()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()

    def replay() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    return time_one(replay, rounds=_REPLAYS).samples[0]


def _plain(weight: Weight) -> Plain:
    return weight.plain if isinstance(weight, GatedWeight) else weight


def _tensor(weight: Weight) -> torch.Tensor:
    plain = _plain(weight)
    return plain.words if isinstance(plain, TritonWeight) else plain


def _sizes(weight: Weight) -> tuple[int, int]:
    plain = _plain(weight)
    if isinstance(plain, TritonWeight):
        return plain.in_features, plain.out_features
    return plain.shape[1], plain.shape[0]


def _uncached(weights: Sequence[Weight]) -> Sequence[Weight]:
    """The first of them that no cache holds together; all where they are fewer."""
    return weights[: -(-_UNCACHED // _tensor(weights[0]).nbytes)]


def _device(weight: Weight) -> torch.device:
    return _tensor(weight).device


def _key(weight: Weight) -> str:
    plain, gated = _plain(weight), isinstance(weight, GatedWeight)
    return packed_key(plain, gated) if isinstance(plain, TritonWeight) else dense_key(plain, gated)
