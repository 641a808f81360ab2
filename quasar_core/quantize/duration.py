"""How long a quantization will take: operations counted off a model's shape, at the rates that they reach here.

Counted are matrix products, and beside them what costs as much: attention and draws while the model writes its text,
and the launches of its many small steps. The count is a pure formula; the rates are measured in about a second.
Letters: N rows of L tokens, in and out a layer's sizes.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import torch

from quasar_core.config import QuantizeConfig
from quasar_core.quantize.activations import batch_tokens
from quasar_core.quantize.calibration import GREEDY_LENGTH, HELD_OUT_ROWS
from quasar_core.quantize.layer_plan import HEAD
from quasar_core.quantize.plan import Shape
from quasar_core.timing import time_one, timed

# Layers that read what another one reads: Hessian and factor are the other's.
SHARED = ("k_proj", "v_proj", "up_proj")
INTO_STREAM = ("o_proj", "down_proj")
# The solver's work on a layer, in products [in, in] × [in, out]; and its scale search, in multiply-adds a weight.
SOLVER_PRODUCTS, SEARCH_OPERATIONS = 8, 400
# As measured on the demo model and the small Llama: in multiply-adds of a product, a key or value that a single token
# attends to, and a draw for each logit; in launches of the smallest operation, a block's step.
ATTENTION_COST, DRAW_COST, LAUNCHES = 8, 1500, 400
MEASURED_SECONDS, UNCACHED_BYTES = 0.2, 64_000_000
# On a CPU, of a product that stands for a larger one: multiply-adds, rows at most and outputs at least.
SHORT_PRODUCT, SHORT_ROWS, SHORT_OUTPUTS = 2**27, 512, 64


@dataclass(frozen=True)
class Work:
    """Multiply-adds of passes over whole rows, of steps of a token a row, of float32 matrices; launches of steps."""

    passes: float
    steps: float
    matrices: float
    launches: float


@dataclass(frozen=True)
class Rates:
    """Multiply-adds a second of the first three, and the seconds of a launch."""

    passes: float
    steps: float
    matrices: float
    launch: float

    def at_least(self, other: "Rates") -> "Rates":
        """The faster of each: what disturbed one measurement may have left the other alone."""
        faster = {name: max(getattr(self, name), getattr(other, name)) for name in ("passes", "steps", "matrices")}
        return Rates(**faster, launch=min(self.launch, other.launch))

    def seconds_of(self, work: Work) -> float:
        """One kind of work after the other."""
        products = work.passes / self.passes + work.steps / self.steps + work.matrices / self.matrices
        return products + work.launches * self.launch


def count_work(shape: Shape, config: QuantizeConfig, rows: int) -> Work:
    """What a run does with a model that writes its text `rows` rows at a time; widths by layer are not counted."""
    length, blocks = config.calibration_length, {_block(name) for name in shape.layers if name != HEAD}
    calibration, held_out, greedy = (
        config.samples * length,
        HELD_OUT_ROWS * length,
        HELD_OUT_ROWS * GREEDY_LENGTH,
    )
    token = sum(out * columns * _share(shape, name) for name, (out, columns) in shape.layers.items() if name != HEAD)
    head = shape.vocabulary * shape.hidden
    attention = 2 * length * sum(columns for name, (_, columns) in shape.layers.items() if name.endswith("o_proj"))
    writes_all = config.calibration == "self"
    written = greedy + (calibration + held_out if writes_all else 0)
    turns = -(-HELD_OUT_ROWS // rows) * GREEDY_LENGTH
    turns += -(-(config.samples + HELD_OUT_ROWS) // rows) * length if writes_all else 0
    return Work(
        passes=2 * (calibration + held_out + greedy) * (token + attention) + 2 * (held_out + greedy) * head,
        steps=written * (token + head + ATTENTION_COST * attention / 2 + DRAW_COST * shape.vocabulary),
        matrices=sum(_matrices(shape, name, calibration) for name in shape.layers),
        launches=turns * LAUNCHES * len(blocks),
    )


def _matrices(shape: Shape, name: str, tokens: int) -> float:
    """Hessian and drift, factor and solver of one layer; where the input is shared, the solver alone."""
    (out, columns), last = shape.layers[name], name.rpartition(".")[2]
    solver = SOLVER_PRODUCTS * columns**2 * out + SEARCH_OPERATIONS * columns * out
    if last in SHARED:
        return solver
    rows = tokens * _share(shape, name)
    stream = rows * columns * out if last in INTO_STREAM else 0
    return 1.5 * rows * columns**2 + stream + columns**3 / 3 + solver


def _share(shape: Shape, name: str) -> float:
    """Of the text, that the layer reads."""
    return shape.routed if ".experts." in name else 1.0


def _block(name: str) -> str:
    return name.split(".layers.")[-1].split(".")[0]


def measure_rates(
    shape: Shape,
    config: QuantizeConfig,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    now: Callable[[], float] = time.perf_counter,
) -> Rates:
    """What products of the model's largest layer reach, with the rows that the work has; and a small operation."""
    size = max((size for name, size in shape.layers.items() if name != HEAD), key=lambda size: size[0] * size[1])
    most = batch_tokens(shape.hidden, device.type != "cpu")
    batch = min(most, config.samples * config.calibration_length)
    small = torch.ones(8, 8, device=device)
    return Rates(
        passes=_rate(batch, size, device, dtype, shape.weights, now),
        steps=_rate(rows, size, device, dtype, shape.weights, now),
        matrices=_rate(size[1], (size[1], batch), device, torch.float32, 0, now),
        launch=_seconds(lambda: [small.add_(1) for _ in range(100)], device, now) / 100,
    )


def _rate(
    rows: int,
    size: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    weights: int,
    now: Callable[[], float],
) -> float:
    """Multiply-adds a second of [rows, in] × [out, in], whose weights come from memory where the model's do.

    A busy CPU leaves a product alone only if it is short: there a few rows and outputs stand for all.
    """
    columns = size[1]
    if device.type == "cpu":
        rows = min(rows, SHORT_ROWS)
        size = min(size[0], max(SHORT_PRODUCT // (rows * columns), SHORT_OUTPUTS)), columns
    one = size[0] * columns
    copies = max(1, min(weights, UNCACHED_BYTES // dtype.itemsize) // one)
    matrices = [torch.randn(size, device=device).to(dtype) for _ in range(copies)]
    x, turns = torch.randn(rows, columns, device=device).to(dtype), cycle(matrices)
    return rows * one / _seconds(lambda: torch.nn.functional.linear(x, next(turns)), device, now)


def _seconds(call: Callable[[], object], device: torch.device, now: Callable[[], float]) -> float:
    """The fastest of many calls, after one that pays for what is done once."""

    def finished() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return time_one(timed(finished, now), MEASURED_SECONDS, warm_up=True, now=now).samples[0]


def about(seconds: float) -> str:
    """As much of it as is known: about 40 s, about 12 min, about 35 min, about 3 h."""
    if seconds < 90:
        return f"about {max(10, round(seconds, -1)):.0f} s"
    value, unit = (seconds / 60, "min") if seconds < 5400 else (seconds / 3600, "h")
    return f"about {round(value) if value < 20 else 5 * round(value / 5)} {unit}"
