"""The best block shapes of a product, measured: graph replays over weights that no cache holds."""

from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

from quasar_core.kernels.triton.blocks import Blocks, dense_blocks, dense_key, packed_blocks, packed_key
from quasar_core.kernels.triton.products import multiply_dense, multiply_packed
from quasar_core.kernels.triton.scratch import scratch
from quasar_core.kernels.triton.tuned import keep_tuned
from quasar_core.kernels.triton.weights import BLOCK, TritonWeight

Weight = TritonWeight | torch.Tensor
Timer = Callable[[Callable[[], None]], float]
_TUNED_ROWS = 8  # a row's result must not depend on T, so one shape serves all T
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
_REPLAYS = 10


def tune(weights: Sequence[Weight], dtype: torch.dtype, timer: Timer | None = None) -> Blocks:
    """Measure the candidates for weights of one shape and keep the fastest for this device.

    Give so many weights that they exceed the GPU's cache together (100 MB will do). `timer` takes a function that
    launches kernels and returns how long they take; the least is the best.
    """
    first = weights[0]
    device = first.words.device if isinstance(first, TritonWeight) else first.device
    in_features, out_features = _sizes(first)
    x = torch.randn(_TUNED_ROWS, in_features, device=device, dtype=dtype)
    out = torch.empty(_TUNED_ROWS, out_features, device=device, dtype=dtype)

    def seconds(blocks: Blocks) -> float:
        def launch() -> None:
            for weight in weights:
                if isinstance(weight, TritonWeight):
                    multiply_packed(x, weight, out, blocks=blocks)
                else:
                    multiply_dense(x, weight, out, blocks=blocks)

        return (timer or replay_seconds)(launch)

    best = min(candidates(first), key=seconds)
    key = packed_key(first) if isinstance(first, TritonWeight) else dense_key(first)
    keep_tuned(device, {key: asdict(best)})
    return best


def candidates(weight: Weight) -> list[Blocks]:
    """Block shapes worth measuring: the rule of thumb's first."""
    in_features, out_features = _sizes(weight)
    if isinstance(weight, TritonWeight):
        rule, device = packed_blocks(weight, weight.words.device), weight.words.device
        inputs = [rule.inputs]
    else:
        rule, device = dense_blocks(weight, weight.device), weight.device
        inputs = [64, 128, 256]
    space = scratch(device)
    found = [rule]
    for outputs in (BLOCK, 2 * BLOCK):
        blocks = -(-out_features // outputs)
        for depth in inputs:
            steps = -(-in_features // depth)
            for splits in _SPLITS:
                if splits > steps or (splits > 1 and not space.fits(splits, 16 * out_features, blocks)):
                    continue
                found += [Blocks(outputs, depth, splits, stages) for stages in (2, 3, 4)]
    return list(dict.fromkeys(found))


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
