"""Which product runs a layer's 16-bit weights at a number of rows: measured on the model's own layers.

The layers of one shape are multiplied one after the other, so that each weight comes from memory as it does in a pass.
"""

from collections.abc import Callable, Iterable, Mapping

import torch

from quasar_core.models.cuda_graphs import record
from quasar_core.models.decoder import DecoderLayer, DenseLinear, JoinedLinear, LeanDecoder, Linear

DenseProduct = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
Shape = tuple[int, int]  # out, in
REPEATS = 5
MOST_LAYERS = 12  # of one shape that are multiplied to time a product


class DenseChoices:
    """The products of a decoder, each by the fastest way for its shape and rows."""

    def __init__(self, decoder: LeanDecoder, ways: Callable[[int], Mapping[str, DenseProduct]]) -> None:
        self._ways = ways  # for so many rows
        self.chosen: dict[tuple[Shape, int], str] = {}
        self._products: dict[tuple[Shape, int], DenseProduct] = {}
        self.seconds: dict[tuple[Shape, int], dict[str, float]] = {}  # of one product, by way
        self._weights: dict[Shape, list[DenseLinear]] = {}
        for linear in dense_parts([*all_products(decoder.layers), decoder.head]):
            self._weights.setdefault(_shape(linear), []).append(linear)
        self._measured: set[int] = set()

    def choose(self, rows: int) -> None:
        """Decide for passes of so many rows, once; where there is one way, or no CUDA, the first one."""
        if rows in self._measured:
            return
        self._measured.add(rows)
        ways = self._ways(rows)
        for shape, layers in self._weights.items():
            best = next(iter(ways))
            if len(ways) > 1 and layers[0].weight.device.type == "cuda":
                seconds = {name: self._time(way, layers, rows) for name, way in ways.items()}
                self.seconds[shape, rows], best = seconds, min(seconds, key=seconds.__getitem__)
            self.chosen[shape, rows], self._products[shape, rows] = best, ways[best]

    def multiply(self, product: Linear, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] → [T, out], for a T that was decided."""
        if isinstance(product, JoinedLinear):
            return torch.cat([self.multiply(part, x) for part in product.parts], dim=-1)
        if isinstance(product, DenseLinear):
            return self._products[_shape(product), x.shape[0]](x, product.weight, product.bias)
        return product(x)

    def _time(self, way: DenseProduct, layers: list[DenseLinear], rows: int) -> float:
        """Seconds of one product: the best replay of a graph of several layers' products."""
        timed = layers[:MOST_LAYERS]
        first = timed[0].weight
        x = torch.randn(rows, first.shape[1], device=first.device, dtype=first.dtype)

        def launch() -> None:
            for layer in timed:
                way(x, layer.weight, layer.bias)

        launch()
        graph = record(launch, first.device)
        return min(time_replay(graph) for _ in range(REPEATS)) / len(timed)


def tune_products(decoder: LeanDecoder) -> str:
    """Choose the block shapes of Triton's products for a decoder's layers, unless known; what was done.

    Call it before products are compared and graphs recorded, which go by these shapes. On the CPU nothing is done: "".
    """
    if decoder.device.type != "cuda":
        return ""
    from quasar_core.kernels.triton.tune import tune_missing

    dense = [linear.weight for linear in dense_parts([*all_products(decoder.layers), decoder.head])]
    packed = [layer.prepared for layer in decoder.packed_layers if layer.choice.kernel.name == "triton"]
    return tune_missing([*dense, *packed], decoder.dtype)


def time_replay(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds that the device takes for one replay."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def all_products(layers: Iterable[DecoderLayer]) -> list[Linear]:
    """The products of all blocks, in order."""
    return [product for layer in layers for product in layer.linears]


def dense_parts(products: Iterable[Linear]) -> Iterable[DenseLinear]:
    """Those in 16 or 32 bits, joined ones part by part."""
    for product in products:
        if isinstance(product, DenseLinear):
            yield product
        elif isinstance(product, JoinedLinear):
            yield from dense_parts(product.parts)


def _shape(linear: DenseLinear) -> Shape:
    return linear.weight.shape[0], linear.weight.shape[1]
