"""Estimate what quantizing a model will need on this machine: its shape, what is free, and how long it will take.

Counted for the time are matrix products, and beside them what costs as much: attention while the model writes its text,
what is done with each logit, and the launches of many small operations. The count is a pure formula; the rates are
measured in about a second. Letters: N rows of L tokens, in and out a layer's sizes.
"""

import math
import time
from collections.abc import Callable, Mapping
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
from quasar_core.quantize.calibration import GREEDY_LENGTH, held_out_rows
from quasar_core.quantize.layer_plan import HEAD, LayerPlan
from quasar_core.quantize.plan import Plan, Shape, make_plan, rows_written
from quasar_core.quantize.solve.matmul import sums_in_bf16
from quasar_core.quantize.successors import MOST_READ, can_be_counted
from quasar_core.quantize.text_plan import Free, TextPlan, free_on, plan_text
from quasar_core.quantize.text_writers import token_bytes
from quasar_core.records import Progress
from quasar_core.store.model_config import read_text_headers
from quasar_core.system import LoadMeter, free_disk, free_memory
from quasar_core.timing import time_one, timed

# Layers that read what another one reads: Hessian and factor are the other's.
SHARED = ("k_proj", "v_proj", "up_proj", "in_proj_z", "w3")
INTO_STREAM = ("o_proj", "out_proj", "down_proj", "w2", "output_linear")
# The solver's work on a layer, in products [in, in] × [in, out]; and its scale search, in multiply-adds a weight.
SOLVER_PRODUCTS, SEARCH_OPERATIONS = 8, 400
# As measured on SmolLM2: in multiply-adds of a product, a key or value that a single token attends to; in launches of
# the smallest operation, a block's step.
ATTENTION_COST, LAUNCHES = 6, 400
# Of passes and steps, with what is no product: norms, activations, copies, a fifth of the time.
BESIDE_PRODUCTS = 1.25
# In softmaxes of as many logits: a draw, a comparison of two models, and the search for the likeliest tokens.
DRAW_COST, COMPARE_COST, SUCCESSOR_COST = 2.5, 4, 1
SOFTMAX_ROWS = 32
MEASURED_SECONDS, UNCACHED_BYTES = 0.2, 64_000_000
# On a CPU, of a product that stands for a larger one: multiply-adds, rows at most and outputs at least.
SHORT_PRODUCT, SHORT_ROWS, SHORT_OUTPUTS = 2**27, 512, 64


KINDS = ("passes", "steps", "sums", "matrices", "logits")


@dataclass(frozen=True)
class Work:
    """Multiply-adds of passes over whole rows, of steps of a token a row, of sums over tokens, of float32 matrices.

    Then logits, counted in softmaxes, and launches.
    """

    passes: float
    steps: float
    sums: float
    matrices: float
    logits: float
    launches: float


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


@dataclass(frozen=True)
class Tokens:
    """How many tokens each part of the work sees: `counted` for their successors, of which `unread` by a pass.

    `compared` are those of fidelity, `read` as often as a model reads one for that; `written` by the target.
    """

    calibration: int
    written: int
    compared: int
    read: int
    counted: int
    unread: int


def count_tokens(shape: Shape, config: QuantizeConfig, text: TextPlan) -> Tokens:
    """Count for a model that writes its text as `text` plans: what it has written, it need not read."""
    length, held_out = config.calibration_length, held_out_rows(config)
    calibration, compared, writes_all = config.texts * length, held_out * (length + GREEDY_LENGTH), True
    written = compared + calibration
    if config.calibration != "self":
        writes_all, written = False, held_out * GREEDY_LENGTH
    remembered = 0 if not text.remembers else compared if writes_all else written
    counted = min(calibration, MOST_READ) if can_be_counted(shape.vocabulary) else 0
    unread = 0 if writes_all and text.is_targets else counted
    return Tokens(calibration, written, compared, 2 * compared - remembered, counted, unread)


def count_work(shape: Shape, config: QuantizeConfig, rows: int, text: TextPlan) -> Work:
    """Count the work on a model that writes its `text` so many rows at a time; widths by layer are not counted."""
    length, blocks = config.calibration_length, {_block(name) for name in shape.layers if name != HEAD}
    tokens, token, attention = count_tokens(shape, config, text), _token(shape), _attention(shape, length)
    turns = -(-held_out_rows(config) // rows) * GREEDY_LENGTH
    turns += -(-(config.texts + held_out_rows(config)) // rows) * length if config.calibration == "self" else 0
    logits = DRAW_COST * tokens.written + COMPARE_COST * tokens.compared + SUCCESSOR_COST * tokens.counted
    return Work(
        passes=sum(_passes(shape, config, tokens)),
        steps=BESIDE_PRODUCTS * tokens.written * (token + _head(shape) + ATTENTION_COST * attention / 2),
        sums=sum(_sums(shape, name, tokens.calibration) for name in shape.layers),
        matrices=sum(_matrices(shape, name, config.reads_no_text) for name in shape.layers),
        logits=logits * shape.vocabulary,
        launches=turns * LAUNCHES * len(blocks),
    )


def _passes(shape: Shape, config: QuantizeConfig, tokens: Tokens) -> tuple[float, float, float]:
    """Multiply-adds of passes over whole rows: of blocks that are quantized, of fidelity, of counting successors."""
    block = BESIDE_PRODUCTS * (_token(shape) + _attention(shape, config.calibration_length))
    fidelity = tokens.read * block + 2 * tokens.compared * _head(shape)
    return 2 * tokens.calibration * block, fidelity, tokens.unread * _head(shape)


def _token(shape: Shape) -> float:
    """Multiply-adds of a token in the layers of all blocks."""
    layers = ((name, size) for name, size in shape.layers.items() if name != HEAD)
    return sum(out * columns * _share(shape, name) for name, (out, columns) in layers)


def _attention(shape: Shape, length: int) -> float:
    """Of a token that attends to so many."""
    return 2 * length * sum(columns for name, (_, columns) in shape.layers.items() if name.endswith("o_proj"))


def _head(shape: Shape) -> int:
    return shape.vocabulary * shape.hidden


def _sums(shape: Shape, name: str, tokens: int) -> float:
    """Count a layer's Hessian and errors; where the input is shared, they are another layer's."""
    (out, columns), last = shape.layers[name], name.rpartition(".")[2]
    if last in SHARED:
        return 0
    errors = columns * out if last in INTO_STREAM else columns**2
    return tokens * _share(shape, name) * (columns**2 / 2 + errors)


def _matrices(shape: Shape, name: str, searches_alone: bool) -> float:
    """Count factor and solver of one layer; where the input is shared, the solver alone; or the search of scales."""
    out, columns = shape.layers[name]
    if searches_alone:
        return SEARCH_OPERATIONS * columns * out
    factor = 0 if name.rpartition(".")[2] in SHARED else columns**3 / 3
    return factor + SOLVER_PRODUCTS * columns**2 * out + SEARCH_OPERATIONS * columns * out


def _share(shape: Shape, name: str) -> float:
    """Return the share of the text that the layer reads."""
    return shape.routed if ".experts." in name else 1.0


def _block(name: str) -> str:
    return name.split(".layers.")[-1].split(".")[0]


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


WHOLE = "the whole run"
NOMINAL = Rates(passes=5e10, steps=4e10, sums=5e10, matrices=5e10, logits=8e8, launch=2e-6)
TEXT, BLOCKS, COUNTING, FIDELITY = "writing", "quantizing", "counting successors", "measuring fidelity"
LEAST_SHARE = 0.02  # of a stage, from which on it tells how long the rest of it takes


def stage_seconds(shape: Shape, config: QuantizeConfig, rows: int, text: TextPlan) -> dict[str, float]:
    """Estimate the seconds of each stage, by the first words of its name."""
    work, tokens = count_work(shape, config, rows, text), count_tokens(shape, config, text)
    blocks, fidelity, counting = (each / NOMINAL.passes for each in _passes(shape, config, tokens))
    logit = shape.vocabulary / NOMINAL.logits
    counted, compared = SUCCESSOR_COST * tokens.counted * logit, COMPARE_COST * tokens.compared * logit
    in_text = counted if tokens.unread == 0 else 0.0
    return {
        TEXT: work.steps / NOMINAL.steps
        + DRAW_COST * tokens.written * logit
        + in_text
        + work.launches * NOMINAL.launch,
        BLOCKS: blocks + work.sums / NOMINAL.sums + work.matrices / NOMINAL.matrices,
        COUNTING: counting + counted - in_text,
        FIDELITY: fidelity + compared,
    }


class WholeRun:
    """A Progress that passes everything on, and tells beside it how far the whole run has come, in thousandths.

    Thousandths are of time: those of the whole that have gone by, as far as it is known.
    """

    def __init__(
        self, progress: Progress, expected: Mapping[str, float], now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._progress, self._expected, self._now = progress, dict(expected), now
        self._start = now()
        self._stage, self._began = "", self._start  # the part that is under way
        self._taken: dict[str, float] = {}  # seconds of those that are over

    def __call__(self, stage: str, done: int, total: int) -> None:
        """As a Progress."""
        self._progress(stage, done, total)
        part = next((name for name in self._expected if stage.startswith(name)), None)
        if part is None:
            return
        if part != self._stage:
            self._leave()
            self._stage, self._began = part, self._now()
        gone = self._now() - self._start
        left = self._left(done / total if total else 1.0)
        self._progress(WHOLE, round(1000 * gone / (gone + left)) if gone + left > 0 else 0, 1000)

    def finish(self) -> None:
        """End the run's progress."""
        self._progress(WHOLE, 1000, 1000)

    def _leave(self) -> None:
        if self._stage:
            self._taken[self._stage] = self._taken.get(self._stage, 0.0) + self._now() - self._began

    def _left(self, share: float) -> float:
        """Estimate the seconds of the rest of this part and of those that come after it."""
        took = self._now() - self._began
        known = dict(self._taken)
        if share >= LEAST_SHARE:
            known[self._stage] = took / share
        factor = sum(known.values()) / sum(self._expected[name] for name in known) if known else 1.0
        own = known.get(self._stage, factor * self._expected[self._stage])
        to_come = [name for name in self._expected if name not in known and name != self._stage]
        return max(own - took, 0.0) + factor * sum(self._expected[name] for name in to_come)


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


def over_whole_run(target: StreamedModel, config: QuantizeConfig, plan: Plan, progress: Progress) -> Progress:
    """Make a progress that also tells how far the whole run has come; the one given where that is not counted."""
    if config.mixed or config.backend != "native":
        return progress
    shape = shape_of(target.skeleton, config, element=target.dtype.itemsize)
    return WholeRun(progress, stage_seconds(shape, config, rows_written(shape, config, plan.text), plan.text))


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
