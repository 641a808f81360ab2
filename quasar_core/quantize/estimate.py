"""Estimate what quantizing a model will need on this machine: its shape, what is free, and how long it will take.

The work is counted (`work.py`), and its rates are measured in about a second. Letters: N rows of L tokens, in and out a
layer's sizes.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from quasar_core.config import QuantizeConfig
from quasar_core.kernels.threads import one_thread
from quasar_core.models.device import DTYPES
from quasar_core.models.hf.experts import SeparateExperts
from quasar_core.quantize.blocks.activations import batch_tokens
from quasar_core.quantize.blocks.streaming import StreamedModel, find_blocks, quantized_layers
from quasar_core.quantize.layer_plan import HEAD, LayerPlan
from quasar_core.quantize.plan import Plan, Shape, make_plan, rows_written
from quasar_core.quantize.solve.matmul import sums_in_bf16
from quasar_core.quantize.text_plan import Free, free_on, plan_text
from quasar_core.quantize.text_writers import token_bytes
from quasar_core.quantize.work import KINDS, Work, count_work
from quasar_core.store.model_config import read_text_headers
from quasar_core.system import LoadMeter, free_disk, free_memory
from quasar_core.timing import time_one, timed

SOFTMAX_ROWS = 32
MEASURED_SECONDS, UNCACHED_BYTES = 0.2, 64_000_000
# On a CPU, of a product that stands for a larger one: multiply-adds, rows at most and outputs at least.
SHORT_PRODUCT, SHORT_ROWS, SHORT_OUTPUTS = 2**27, 512, 64


@dataclass(frozen=True)
class Rates:
    """Multiply-adds or logits a second of the first four, and the seconds of a launch."""

    passes: float
    steps: float
    sums: float
    matrices: float
    logits: float
    launch: float

    def at_least(self, other: "Rates") -> "Rates":
        """Take the faster of each: what disturbed one measurement may have left the other alone."""
        faster = {name: max(getattr(self, name), getattr(other, name)) for name in KINDS}
        return Rates(**faster, launch=min(self.launch, other.launch))

    def seconds_of(self, work: Work) -> float:
        """Add up the seconds, one kind of work after the other."""
        parts: list[float] = [getattr(work, kind) / getattr(self, kind) for kind in KINDS]
        return sum(parts) + work.launches * self.launch


def measure_rates(
    shape: Shape,
    config: QuantizeConfig,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    text_dtype: torch.dtype | None = None,
    now: Callable[[], float] = time.perf_counter,
) -> Rates:
    """Measure what products of the model's largest layer reach at the work's rows, softmaxes, and a small operation."""
    size = max((size for name, size in shape.layers.items() if name != HEAD), key=lambda size: size[0] * size[1])
    most = batch_tokens(shape.hidden, device.type != "cpu")
    batch = min(most, max(1, config.texts) * config.calibration_length)
    small, logits = torch.ones(8, 8, device=device), torch.randn(SOFTMAX_ROWS, shape.vocabulary, device=device)
    passes = _rate(batch, size, device, dtype, shape.weights, now)
    steps = _rate(rows, size, device, text_dtype or dtype, shape.weights, now)
    matrices = _rate(size[1], (size[1], batch), device, torch.float32, 0, now)
    return Rates(
        passes=passes,
        steps=steps,
        sums=passes if sums_in_bf16(device, dtype) else matrices,
        matrices=matrices,
        logits=logits.numel() / _seconds(lambda: logits.softmax(dim=-1), device, now),
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
    """Measure multiply-adds a second of [rows, in] × [out, in], whose weights come from memory where the model's do.

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
    """Time the fastest of many calls, after one that pays for what is done once."""

    def finished() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return time_one(timed(finished, now), MEASURED_SECONDS, warm_up=True, now=now).samples[0]


def about(seconds: float) -> str:
    """Say as much of it as is known: about 40 s, about 12 min, about 35 min, about 3 h."""
    if seconds < 90:
        return f"about {max(10, round(seconds, -1)):.0f} s"
    value, unit = (seconds / 60, "min") if seconds < 5400 else (seconds / 3600, "h")
    return f"about {round(value) if value < 20 else 5 * round(value / 5)} {unit}"


SHARE_OF_MEMORY = 2  # hidden states may fill one part in so many of what is free, unless --max-memory says otherwise


def plan_here(
    source: Path, target: StreamedModel, config: QuantizeConfig, output: Path, max_memory: int | None = None
) -> Plan:
    """Plan for a model on this machine, with what is free here."""
    stored = stored_element(source)
    shape = shape_of(target.skeleton, config, stored, target.dtype.itemsize, target.whole_because)
    free = Free(free_memory(), free_on(target.device), free_disk(output))
    allowed = max_memory or (free.memory // SHARE_OF_MEMORY if free.memory else None)
    text = plan_text(source, target, free, rounds=True)
    plan = make_plan(shape, config, target.device.type != "cpu", allowed, free.device, text)
    return replace(plan, free_host=free.memory, free_disk=free.disk)


def with_seconds(target: StreamedModel, config: QuantizeConfig, plan: Plan) -> Plan:
    """Add to a plan how long it would take here; not where that is not counted: widths by layer, another backend."""
    if config.mixed or config.backend != "native":
        return plan
    shape = shape_of(target.skeleton, config, element=target.dtype.itemsize)
    writer = target.device if plan.text.on_device else torch.device("cpu")
    rows = rows_written(shape, config, plan.text)
    meter = LoadMeter()
    text_dtype = DTYPES[plan.text.dtype]
    rates = measure_rates(shape, config, target.device, target.dtype, rows, text_dtype)
    if writer != target.device:
        steps = measure_rates(shape, config, writer, target.dtype, rows, text_dtype)
        rates = replace(rates, steps=steps.steps, launch=steps.launch)
    load = meter.read()
    if load.is_busy and target.device.type == "cpu":  # threads that wait for one another are slowed many times over
        with one_thread():
            rates = rates.at_least(measure_rates(shape, config, target.device, target.dtype, rows, text_dtype))
    return replace(plan, seconds=rates.seconds_of(count_work(shape, config, rows, plan.text)), others=load.others)


def shape_of(
    skeleton: PreTrainedModel,
    config: QuantizeConfig,
    stored: int = 2,
    element: int = 2,
    whole_because: str | None = None,
) -> Shape:
    """Collect what a plan reads of a model: names and sizes, no weights."""
    layers = layer_sizes(skeleton, config)
    tied: Any = getattr(skeleton, "all_tied_weights_keys", None) or {}
    sizes = {name: parameter.numel() for name, parameter in skeleton.named_parameters() if name not in tied}
    prefix = find_blocks(skeleton)[0]
    return Shape(
        layers=layers,
        other_weights=sum(size for name, size in sizes.items() if name.removesuffix(".weight") not in layers),
        ends_weights=sum(size for name, size in sizes.items() if not name.startswith(f"{prefix}.")),
        hidden=int(skeleton.config.get_text_config().hidden_size),
        vocabulary=int(skeleton.config.get_text_config().vocab_size),
        stored=stored,
        element=element,
        routed=_routed_share(skeleton),
        token=token_bytes(skeleton, element),
        whole_because=whole_because,
    )


def layer_sizes(skeleton: PreTrainedModel, config: QuantizeConfig) -> dict[str, tuple[int, int]]:
    """List outputs and inputs of every layer that gets codes, by name; raises as `quantized_layers` does."""
    layers = quantized_layers(skeleton, LayerPlan.of(config))
    return {name: (linear.out_features, linear.in_features) for name, linear in layers.items()}


def _routed_share(skeleton: PreTrainedModel) -> float:
    """Return the share of a text that the router sends to an expert, if it favours none; 1 without experts."""
    experts = [len(module) for module in skeleton.modules() if isinstance(module, SeparateExperts)]
    taken = getattr(skeleton.config.get_text_config(), "num_experts_per_tok", None)
    return taken / experts[0] if experts and taken else 1.0


def stored_element(source: Path) -> int:
    """Return the bytes of a weight as it is read: of the widths that occur, the one that most bytes have.

    They are 2 or more, as weights of 8 bits are dequantized to 16.
    """
    sizes: dict[int, int] = {}
    for entry in read_text_headers(source):
        element = entry.size // max(1, math.prod(entry.shape))
        sizes[element] = sizes.get(element, 0) + entry.size
    return max(2, max(sizes, key=lambda element: sizes[element]))
