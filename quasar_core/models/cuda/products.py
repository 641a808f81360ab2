"""Choose the product that runs a layer's 16-bit weights at a number of rows, measured on the model's own layers.

The layers of one shape are multiplied one after the other, so that each weight comes from memory as it does in a pass.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from quasar_core.checkpoint.compressed_tensors import Float8Weight
from quasar_core.kernels.base import RoundedRows, TunableKernel
from quasar_core.kernels.eight_bit import Int8Weight
from quasar_core.kernels.linear import PackedLinear
from quasar_core.models.cuda.graphs import record
from quasar_core.models.cuda.torch_steps import SILU, Activation, Gated, Rows, Steps
from quasar_core.models.decoder.layer import DecoderLayer, DenseLinear, FusedLinear, Linear
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.records import Progress, no_progress

DenseProduct = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
Shape = tuple[int, int]  # out, in
REPEATS = 5
MOST_LAYERS = 12  # of one shape that are multiplied to time a product
DENSE = "dense"  # a kind of product
WIDEST = 64  # rows of a product at once, so that whatever their number their sums are taken alike
ONE_LAUNCH, TWO_LAUNCHES = "one launch", "two launches"  # for a product and its gate


class DenseChoices:
    """The ways of a decoder's products, and whether gates join theirs.

    One that `measures` takes the fastest way for each shape and each number of rows. Otherwise every number of rows
    goes the same way, so that a row's sums do not depend on it: the first one, and gates join products in 16 bits.
    """

    def __init__(self, decoder: LeanDecoder, steps: Steps, measures: bool = False) -> None:
        self.steps, config = steps, decoder.config
        self._measures = measures and decoder.device.type == "cuda"
        self._joins = config.gated and config.activation == "silu"  # what products of gates may end with
        self.chosen: dict[tuple[Shape, int], str] = {}
        self.seconds: dict[tuple[Shape, int], dict[str, float]] = {}  # of one product, by way
        self.chosen_gates: dict[tuple[str, int], str] = {}  # by kind of product and rows
        self.gate_seconds: dict[tuple[str, int], dict[str, float]] = {}
        self._products: dict[tuple[Shape, int], DenseProduct] = {}
        self._weights: dict[Shape, list[DenseLinear]] = {}
        self._gates: dict[str, list[Linear]] = {}
        for linear in dense_parts([*all_products(decoder.layers), decoder.head]):
            self._weights.setdefault(_shape(linear), []).append(linear)
        for gate_up in gate_products(decoder.layers):
            self._gates.setdefault(_kind(gate_up), []).append(gate_up)
        self._columns, self._dtype, self._device = decoder.config.hidden_size, decoder.dtype, decoder.device
        self._measured: set[int] = set()

    def choose(self, rows: int) -> None:
        """Decide for passes of so many rows, once."""
        if rows > WIDEST:
            self.choose(WIDEST)
            self.choose(rows % WIDEST or WIDEST)
        if rows > WIDEST or rows in self._measured:
            return
        self._measured.add(rows)
        for shape, layers in self._weights.items():
            self._choose_product(shape, layers, rows)
        for kind, products in self._gates.items():
            self._choose_gate(kind, products, rows)

    def number_for(self, product: Linear, rows: int) -> torch.dtype | None:
        """The 8-bit dtype in which a product takes so many rows; None where it takes them in 16 bits."""
        return product.rounds_to(rows) if isinstance(product, PackedLinear) else None

    def multiply(self, product: Linear, x: Rows) -> torch.Tensor:
        """x [T, in] → [T, out], for a T that was decided; of many rows so many at a time."""
        if isinstance(x, RoundedRows):
            assert isinstance(product, PackedLinear)
            return product.multiply_rounded(x, self._dtype)
        if isinstance(product, FusedLinear):
            return torch.cat([self.multiply(part, x) for part in product.parts], dim=-1)
        if isinstance(product, DenseLinear):
            return _joined(
                [self._products[_shape(product), len(part)](part, product.weight, product.bias) for part in _parts(x)]
            )
        return product(x)

    def gate(self, product: Linear, x: Rows, number: torch.dtype | None = None, activation: Activation = SILU) -> Rows:
        """x [T, in] → activation(gate) · up [T, I] of a product whose outputs are gates, then what they gate."""
        if isinstance(x, torch.Tensor) and len(x) > WIDEST and number is None:
            return _joined([self.gate(product, part, None, activation) for part in _parts(x)])
        if isinstance(x, torch.Tensor) and self.chosen_gates[_kind(product), len(x)] == ONE_LAUNCH:
            gated = self.steps.gated_product(product, len(x))
            assert gated is not None
            return gated(x)
        return self.steps.gated(self.multiply(product, x), number, activation)

    def _choose_product(self, shape: Shape, layers: list[DenseLinear], rows: int) -> None:
        ways = self.steps.dense_products(rows)
        best = next(iter(ways))
        if len(ways) > 1 and self._measures:
            calls = {name: [partial(way, weight=x.weight, bias=x.bias) for x in layers] for name, way in ways.items()}
            self.seconds[shape, rows], best = self._fastest(calls, rows, shape[1])
        self.chosen[shape, rows], self._products[shape, rows] = best, ways[best]

    def _choose_gate(self, kind: str, products: list[Linear], rows: int) -> None:
        """Product and gate in two launches, or in one where there is such a product and it is faster."""
        joined = [self.steps.gated_product(product, rows) for product in products if self._joins]
        calls: dict[str, list[Gated]] = {ONE_LAUNCH: [gated for gated in joined if gated]}
        best = ONE_LAUNCH if calls[ONE_LAUNCH] and isinstance(products[0], DenseLinear) else TWO_LAUNCHES
        if calls[ONE_LAUNCH] and self._measures:
            calls[TWO_LAUNCHES] = [partial(self._gate_apart, product) for product in products]
            self.gate_seconds[kind, rows], best = self._fastest(calls, rows, self._columns)
        self.chosen_gates[kind, rows] = best

    def _gate_apart(self, product: Linear, x: Rows) -> Rows:
        return self.steps.gated(self.multiply(product, x))

    def _fastest(self, ways: Mapping[str, Sequence[Gated]], rows: int, columns: int) -> tuple[dict[str, float], str]:
        """Seconds of one call of each way, and the fastest way."""
        x = torch.randn(rows, columns, device=self._device, dtype=self._dtype)
        seconds = {name: self._time(calls[:MOST_LAYERS], x) for name, calls in ways.items()}
        return seconds, min(seconds, key=seconds.__getitem__)

    def _time(self, calls: Sequence[Gated], x: torch.Tensor) -> float:
        """Seconds of one call: the best replay of a graph of several layers' products."""

        def launch() -> None:
            for call in calls:
                call(x)

        launch()
        graph = record(launch, self._device)
        return min(time_replay(graph) for _ in range(REPEATS)) / len(calls)


def _parts(x: torch.Tensor) -> Sequence[torch.Tensor]:
    """Rows [T, in] in parts that are multiplied at once."""
    return x.split(WIDEST) if len(x) > WIDEST else (x,)


def _joined(parts: Sequence[Rows]) -> torch.Tensor:
    rows = [part for part in parts if isinstance(part, torch.Tensor)]
    assert len(rows) == len(parts)  # none comes rounded where no number was asked for
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def tune_products(decoder: LeanDecoder, progress: Progress = no_progress, gates_of_codes: bool = True) -> str:
    """Choose the block shapes of Triton's products for a decoder's layers, unless known; what was done.

    Those of products of codes that end with the gate only where they are asked for.

    Call it before products are compared and graphs recorded, which go by these shapes. On the CPU nothing is done: "".
    """
    if decoder.device.type != "cuda":
        return ""
    from quasar_core.kernels.triton.tune import GatedWeight, tune_missing
    from quasar_core.models.cuda.triton_steps import gated_part

    dense = [linear.weight for linear in dense_parts([*all_products(decoder.layers), decoder.head])]
    dense += [layer.experts.router for layer in decoder.layers if layer.experts is not None]
    products = packed_parts([*all_products(decoder.layers), decoder.head])
    packed = [tunable_part(layer) for layer in products if isinstance(layer.choice.kernel, TunableKernel)]
    gates = [part for part in map(gated_part, gate_products(decoder.layers)) if part is not None]
    gated = [GatedWeight(part) for part in gates if gates_of_codes or isinstance(part, torch.Tensor)]
    return tune_missing([*dense, *packed, *gated], decoder.dtype, progress=progress)


def tunable_part(layer: PackedLinear) -> Any:
    """What the tuner takes of a layer on one of Triton's kernels: packed codes as they are, 8-bit values alone."""
    prepared = layer.prepared
    return prepared.values if isinstance(prepared, Int8Weight | Float8Weight) else prepared


def time_replay(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds that the device takes for one replay."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def all_products(layers: Iterable[DecoderLayer]) -> list[Linear]:
    """The products of all blocks, in order; those of experts that are chosen have kernels of their own."""
    products: list[Linear] = []
    for layer in layers:
        products += layer.linears if layer.experts is None else replace(layer, experts=None).linears
        products += (layer.experts and layer.experts.shared) or ()
    return products


def gate_products(layers: Iterable[DecoderLayer]) -> list[Linear]:
    """The products of gates and what they gate: of MLPs, and of experts of every token."""
    mlps = [layer.mlp if layer.experts is None else layer.experts.shared for layer in layers]
    return [mlp[0] for mlp in mlps if mlp is not None]


def packed_parts(products: Iterable[Linear]) -> Iterable[PackedLinear]:
    """The products on packed codes, joined ones part by part."""
    for product in products:
        if isinstance(product, PackedLinear):
            yield product
        elif isinstance(product, FusedLinear):
            yield from packed_parts(product.parts)


def dense_parts(products: Iterable[Linear]) -> Iterable[DenseLinear]:
    """The products in 16 or 32 bits, joined ones part by part."""
    for product in products:
        if isinstance(product, DenseLinear):
            yield product
        elif isinstance(product, FusedLinear):
            yield from dense_parts(product.parts)


def _shape(linear: DenseLinear) -> Shape:
    return linear.weight.shape[0], linear.weight.shape[1]


def _kind(product: Linear) -> str:
    """What the choice about a gate depends on: its kernel, bits and outputs."""
    if isinstance(product, PackedLinear):
        return f"{product.choice.kernel.name} {product.bits} bits, {product.out_features} outputs"
    return f"{DENSE}, {len(product.weight)} outputs" if isinstance(product, DenseLinear) else "joined"
