"""Part of a GPU bench: every product kernel alone, over the shapes of the model, against its floor.

Weights rotate through more memory than a cache holds; a graph of one product for each of them is replayed, so that
launching costs nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from quasar_core.bench.steps import layer_bytes
from quasar_core.kernels.base import LayerShape, TunableKernel
from quasar_core.kernels.select import packed_kernels
from quasar_core.kernels.times import random_weight
from quasar_core.kernels.triton.adapters import why_not_triton
from quasar_core.models.cuda.choose import choose_steps
from quasar_core.models.cuda.graphs import record
from quasar_core.models.cuda.products import time_replay
from quasar_core.models.decoder.linear import block_products, head_product
from tools.gpu_bench.models import Bench, Plan
from tools.gpu_bench.passes import time_pass

PART = "products"
UNCACHED = {"cuda": 256_000_000, "cpu": 1_000_000}  # bytes
REPEATS = 5
TUNING_S = 1.5  # for one shape in 16 bits, where no pass has tuned it
FORMATS = ((4, 128, False), (8, 128, False), (8, -1, False), (8, -1, True))  # bits, group size, floating point

Multiply = Callable[[torch.Tensor], Any]  # x [T, in] by some weight


def run(bench: Bench) -> None:
    """Shapes of a block and the head, each in 16 bits and in every packed format."""
    for shape in shapes(bench.plan):
        bench.report.attempt(PART, f"{shape[0]} → {shape[1]}, 16 bits", partial(time_dense, bench, shape))
        for bits, group, floating in FORMATS:
            layer = LayerShape(*shape, bits=bits, group_size=group, trivial_groups=True, floating=floating)
            bench.report.attempt(PART, str(layer), partial(time_packed, bench, layer))


def shapes(plan: Plan) -> list[tuple[int, int]]:
    """Inputs and outputs of the products of a block, and of the head."""
    products = [*block_products(plan.config, 0).values(), head_product(plan.config)]
    return list(dict.fromkeys((product.columns, sum(product.rows)) for product in products))


def time_dense(bench: Bench, shape: tuple[int, int]) -> None:
    """The ways to multiply 16-bit weights."""
    plan, (columns, outputs) = bench.plan, shape
    size = plan.dtype.itemsize * columns * outputs
    weights = [torch.randn(outputs, columns, device=plan.device, dtype=plan.dtype) for _ in range(copies(size, plan))]
    if why_not_triton(plan.device, plan.dtype) is None:
        from quasar_core.kernels.triton.tune import tune_missing

        bench.report.say(f"{shape}, 16 bits: {tune_missing(weights, plan.dtype, seconds=TUNING_S)}")
    steps, _ = choose_steps(plan.device, plan.dtype)
    for name, way in steps.dense_products(1).items():
        calls = [partial(way, weight=weight, bias=None) for weight in weights]
        add_row(bench, name, shape, dict(time_rows(calls, columns, plan)), size, bits=16)


def time_packed(bench: Bench, layer: LayerShape) -> None:
    """Every packed kernel that runs the shape."""
    plan, shape = bench.plan, (layer.in_features, layer.out_features)
    size = layer_bytes(*shape, layer.bits, layer.group_size)
    weight = random_weight(layer, plan.device)
    for kernel in packed_kernels(layer):
        left_out = plan.dry and kernel.name == "vnni"  # which is compiled
        if left_out or kernel.why_not(layer, plan.device, plan.dtype):
            continue
        prepared = [kernel.prepare(weight, plan.device, plan.dtype) for _ in range(copies(size, plan))]
        if isinstance(kernel, TunableKernel) and (tuned := kernel.tune(prepared, plan.dtype)):
            bench.report.say(f"{shape}, {layer.bits} bits: {tuned}")
        calls = [partial(kernel.multiply, prepared=each) for each in prepared]
        times = dict(time_rows(calls, layer.in_features, plan))
        add_row(bench, kernel.name, shape, times, size, bits=layer.bits, group_size=layer.group_size)


def copies(size: int, plan: Plan) -> int:
    """Weights of so many bytes that fill more than a cache."""
    return max(1, -(-UNCACHED[plan.device.type] // size))


def time_rows(calls: Sequence[Multiply], columns: int, plan: Plan) -> Iterator[tuple[int, float]]:
    """Seconds of one product, by its rows: those of all weights, one after the other, ÷ their number."""
    for rows in plan.tokens:
        x = torch.randn(rows, columns, device=plan.device, dtype=plan.dtype)

        def launch(x: torch.Tensor = x) -> None:
            for call in calls:
                call(x)

        launch()
        if plan.device.type == "cuda":
            graph = record(launch, plan.device)
            yield rows, min(time_replay(graph) for _ in range(REPEATS)) / len(calls)
        else:
            yield rows, time_pass(launch, plan.device)[0] / len(calls)


def add_row(bench: Bench, kernel: str, shape: tuple[int, int], times: dict[int, float], size: int, **form: int) -> None:
    """A kernel on a shape: µs by rows, and the µs that its bytes take."""
    bench.report.add(
        PART,
        kernel=kernel,
        inputs=shape[0],
        outputs=shape[1],
        **form,
        us={rows: round(1e6 * seconds, 2) for rows, seconds in times.items()},
        floor_us=1e6 * size / bench.bandwidth,
    )
