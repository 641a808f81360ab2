"""Time passes of T tokens against their floor: the bytes that a pass must read ÷ the bandwidth of the same run.

The models are a stored pair, or random weights of a named shape. Letters: T tokens of a pass.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from quasar_core.bench.synthetic_models import random_pair, random_transformers_model
from quasar_core.config import QuantizeConfig
from quasar_core.errors import QuasarError, UsageError
from quasar_core.files import read_json, refuse_foreign, write_json
from quasar_core.kernels.linear import PackedLinear
from quasar_core.kernels.times import device_name
from quasar_core.models.base import CausalLM, KVCache
from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.config.shapes import shape_named
from quasar_core.models.cpu.compressed_weights import saved_bytes
from quasar_core.models.cpu.cpu_pass import CpuPass
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.decoder.linear import Product, block_products, head_product
from quasar_core.models.device import choose_device, choose_dtype
from quasar_core.models.hf import causal_lm
from quasar_core.models.loading import describe_kernels_in_use, describe_passes
from quasar_core.models.pair import Pair
from quasar_core.records import Progress, no_progress
from quasar_core.system import git_hash, package_versions
from quasar_core.timing import Sampler, Timing, time_in_turn, time_one, timed

# Beyond what caches hold; a GPU needs more, or launching would be part of the time.
PROBE_BYTES = {"cpu": 512_000_000, "cuda": 4_000_000_000}
PROBE_REPEATS = 5


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second, the best of a few sums in all threads: no pass over weights in memory can be faster."""
    size = PROBE_BYTES[device.type]
    data = torch.ones(size // 4, dtype=torch.float32, device=device)
    return size / time_one(timed(lambda: data.sum().item()), rounds=PROBE_REPEATS).samples[0]


TARGET, VERIFIER, REFERENCE = "target", "verifier", "transformers"


@dataclass(frozen=True)
class Candidate:
    """A model to time: what runs its products, and the bytes of weights that a pass reads."""

    model: CausalLM
    kernel: str
    weight_bytes: int


@dataclass(frozen=True)
class Candidates:
    """The models that a run times, of one shape, by their roles; `all_layers` are those of the shape taken whole.

    `notes` say what was chosen, and why.
    """

    name: str
    by_name: dict[str, Candidate]
    shape: DecoderConfig
    dtype: torch.dtype
    all_layers: int
    notes: Sequence[str]


@dataclass(frozen=True)
class RandomShape:
    """Random weights of a published shape: its name, how many of its layers (None: all), the verifier's codes."""

    name: str
    layers: int | None = None
    codes: QuantizeConfig = field(default_factory=QuantizeConfig)

    def config(self) -> dict[str, Any]:
        """The config.json; UsageError for a shape that is not known, or more layers than it has."""
        whole = shape_named("--shape", self.name)
        layers = whole["num_hidden_layers"] if self.layers is None else self.layers
        if not 1 <= layers <= whole["num_hidden_layers"]:
            raise UsageError(f"--layers must be from 1 to {whole['num_hidden_layers']}, not {layers}.")
        return {**whole, "num_hidden_layers": layers}


def pair_candidates(pair: Pair, reference_folder: Path | None) -> Candidates:
    """A loaded pair, and the target of a folder in transformers; QuasarError where the pair is not our decoder's."""
    target, verifier = pair.target, pair.verifier
    if not isinstance(target, LeanDecoder) or not isinstance(verifier, LeanDecoder):
        raise QuasarError(
            f"bench steps counts the bytes of our own decoder, and {pair.target_name} does not run on it."
        )
    by_name = {TARGET: lean_candidate(target), VERIFIER: lean_candidate(verifier)}
    if reference_folder is not None:
        reference = causal_lm.load_target(reference_folder, pair.device, pair.dtype)
        by_name[REFERENCE] = reference_candidate(reference, by_name[TARGET])
    return Candidates(pair.target_name, by_name, target.config, pair.dtype, target.config.num_layers, pair.notes)


def random_candidates(
    random: RandomShape,
    device: str = "auto",
    dtype: str = "auto",
    kernel: str = "auto",
    fast: bool = False,
    with_reference: bool = False,
    progress: Progress = no_progress,
) -> Candidates:
    """Random weights of a shape, in memory."""
    shape = random.config()
    config = DecoderConfig.parse(shape)
    place = choose_device(device)
    precision, reason = choose_dtype(dtype, shape["dtype"], weight_bytes(config, 2), place)
    target, verifier = random_pair(config, random.codes, place, precision, kernel, progress)
    passes = describe_passes({TARGET: target, VERIFIER: verifier}, progress, fast)
    by_name = {TARGET: lean_candidate(target), VERIFIER: lean_candidate(verifier)}
    if with_reference:
        reference = random_transformers_model(shape, place, precision)
        by_name[REFERENCE] = reference_candidate(reference, by_name[TARGET])
    all_layers = replace(random, layers=None).config()["num_hidden_layers"]
    notes = [
        f"dtype: {str(precision).removeprefix('torch.')}, {reason}",
        *describe_kernels_in_use(verifier.packed_layers),
        *passes,
    ]
    return Candidates(f"{random.name}, random weights", by_name, config, precision, all_layers, notes)


def lean_candidate(decoder: LeanDecoder) -> Candidate:
    """A target or a verifier with its kernels and bytes."""
    packed = list(decoder.packed_layers)
    kernels = dict.fromkeys(layer.choice.kernel.name for layer in packed)
    dense = "rows in C++" if isinstance(decoder.fast, CpuPass) else "torch linear"
    size = verifier_bytes(decoder.config, packed, decoder.dtype.itemsize) - saved_bytes(decoder)
    return Candidate(decoder, ", ".join(kernels) or dense, size)


def reference_candidate(model: CausalLM, target: Candidate) -> Candidate:
    """The target's weights, run by transformers."""
    return Candidate(model, "transformers, not compiled", target.weight_bytes)


def weight_bytes(config: DecoderConfig, itemsize: int) -> int:
    """Weights and biases of all blocks and the head in 16 or 32 bits; norms and embedding rows are next to nothing."""
    products = (product for index in range(config.num_layers) for product in block_products(config, index).values())
    return itemsize * sum(_elements(product) for product in (*products, head_product(config)))


def _elements(product: Product) -> int:
    rows = sum(product.rows)
    return rows * product.columns + (rows if product.bias else 0)


def layer_bytes(in_features: int, out_features: int, bits: int, group_size: int) -> int:
    """Codes, float16 scales and packed zeros of a layer, whatever its kernel makes of them."""
    groups = 1 if group_size == -1 else -(-in_features // group_size)
    return out_features * (in_features * bits + groups * (16 + bits)) // 8


def verifier_bytes(config: DecoderConfig, packed: Sequence[PackedLinear], itemsize: int) -> int:
    """Packed layers by their codes, the rest as the target has it."""
    saved = sum(
        itemsize * layer.in_features * layer.out_features
        - layer_bytes(layer.in_features, layer.out_features, layer.bits, layer.group_size)
        for layer in packed
    )
    return weight_bytes(config, itemsize) - saved


def cache_bytes(config: DecoderConfig, positions: int, itemsize: int) -> int:
    """Keys and values of these positions in all layers; a sliding window reads no more than its own."""
    return sum(
        2 * min(positions, block.window or positions) * block.kv_heads * block.head_size * itemsize
        for block in config.blocks
    )


MOST_TOKENS = 256
CONTEXT_CHUNK = 256
PASSES_FOR_SHARES = 3

Samples = dict[tuple[str, int], Timing]  # of the passes of a model over T tokens


@dataclass(frozen=True)
class StepConfig:
    """Which passes are timed: their tokens, the positions before them, how often each."""

    tokens: tuple[int, ...] = (1, 2, 4, 6, 8, 12, 16)
    context: int = 256
    rounds: int = 7

    def __post_init__(self) -> None:
        if not self.tokens or not all(1 <= count <= MOST_TOKENS for count in self.tokens):
            raise UsageError(f"--tokens must be numbers from 1 to {MOST_TOKENS}, separated by commas.")
        if self.context < 1:
            raise UsageError(f"--context must be at least 1, not {self.context}.")
        if self.rounds < 1:
            raise UsageError(f"--rounds must be at least 1, not {self.rounds}.")


@dataclass(frozen=True)
class StepRow:
    """One model's pass over T tokens. The floor is that of the higher bandwidth; `slow_floor_ms` of the lower.

    `outside` is the share of the pass outside its matrix products, None where the pass does not tell; `spread` that of
    its best times.
    """

    model: str
    tokens: int
    ms: float
    bytes: int
    floor_ms: float
    slow_floor_ms: float
    kernel: str
    outside: float | None = None
    spread: float | None = None

    @property
    def ratio(self) -> float:
        """How many times the floor the pass takes."""
        return self.ms / self.floor_ms


@dataclass(frozen=True)
class StepReport:
    """One run: what was timed, where, the bandwidth before and after in bytes per second, a row for each pass."""

    name: str
    layers: int
    all_layers: int
    config: StepConfig
    device: str
    dtype: str
    versions: dict[str, str]
    git: str | None
    bandwidth: tuple[float, float]
    rows: list[StepRow]
    others: float | None = None  # the share of the cores that other programs took while passes were timed

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, ratios included."""
        return {**asdict(self), "rows": [{**asdict(row), "ratio": row.ratio} for row in self.rows]}

    def write(self, path: Path) -> None:
        """The JSON form as a file; QuasarError where it cannot be written."""
        try:
            write_json(path, self.to_dict())
        except OSError as error:
            raise QuasarError(f"{path} could not be written: {error.strerror}.") from error


def refuse_foreign_report(path: Path) -> None:
    """Refuse, before any timing, an output that exists and is no report of steps."""
    refuse_foreign(path, "--output", "a report of quasar bench steps", _is_report)


def _is_report(path: Path) -> bool:
    content = read_json(path)
    return {"bandwidth", "rows", "all_layers"} <= content.keys()


def measure_steps(candidates: Candidates, config: StepConfig, progress: Progress = no_progress) -> StepReport:
    """Time all passes of all models, interleaved, between two probes of the bandwidth."""
    shape, itemsize = candidates.shape, candidates.dtype.itemsize
    device = next(iter(candidates.by_name.values())).model.device
    before = read_bandwidth(device)
    models = {name: candidate.model for name, candidate in candidates.by_name.items()}
    samples = time_passes(models, config, progress)
    bandwidth = before, read_bandwidth(device)
    outside = shares_outside_products(models, config)
    states = {count: cache_bytes(shape, config.context + count, itemsize) for count in config.tokens}
    return StepReport(
        name=candidates.name,
        layers=shape.num_layers,
        all_layers=candidates.all_layers,
        config=config,
        device=device_name(device),
        dtype=str(candidates.dtype).removeprefix("torch."),
        versions=package_versions(),
        git=git_hash(),
        bandwidth=bandwidth,
        rows=list(step_rows(samples, candidates.by_name, states, bandwidth, outside)),
        others=next(iter(samples.values())).load.others,
    )


def step_rows(
    samples: Samples,
    candidates: Mapping[str, Candidate],
    states: Mapping[int, int],
    bandwidth: tuple[float, float],
    outside: Mapping[tuple[str, int], float],
) -> Iterator[StepRow]:
    """The rows behind samples; `states` are the bytes of keys and values by T."""
    for (name, tokens), timing in samples.items():
        size = candidates[name].weight_bytes + states[tokens]
        yield StepRow(
            model=name,
            tokens=tokens,
            ms=1000 * timing.median,
            bytes=size,
            floor_ms=1000 * size / max(bandwidth),
            slow_floor_ms=1000 * size / min(bandwidth),
            kernel=candidates[name].kernel,
            outside=outside.get((name, tokens)),
            spread=timing.spread if len(timing.samples) > 1 else None,
        )


def time_passes(models: Mapping[str, CausalLM], config: StepConfig, progress: Progress = no_progress) -> Samples:
    """The timing of each pass: in every round each length, for each length each model; a first round is not counted."""
    vocabulary = min(model.vocab_size for model in models.values())
    text = torch.randint(vocabulary, (config.context,), generator=torch.Generator().manual_seed(0)).tolist()
    caches = {name: _filled_cache(model, text, max(config.tokens)) for name, model in models.items()}
    turns = [(name, count) for count in config.tokens for name in models]
    done = 0

    def sampler(name: str, count: int) -> Sampler:
        tokens = (text * count)[:count]

        def sample() -> float:
            nonlocal done
            progress("passes", done // len(turns), config.rounds + 1)
            done += 1
            seconds = _time_pass(models[name], caches[name], tokens)
            caches[name].rollback(config.context)
            return seconds

        return sample

    timings = time_in_turn({turn: sampler(*turn) for turn in turns}, rounds=config.rounds, warm_up=True)
    progress("passes", config.rounds + 1, config.rounds + 1)
    return {(name, count): timings[name, count] for name in models for count in config.tokens}


def shares_outside_products(models: Mapping[str, CausalLM], config: StepConfig) -> dict[tuple[str, int], float]:
    """The share of a pass over T tokens that is not spent in matrix products, of the models that count it."""
    shares: dict[tuple[str, int], float] = {}
    for name, model in models.items():
        clocks = getattr(getattr(model, "fast", None), "seconds", None)
        if clocks is None:
            continue
        cache = _filled_cache(model, [0] * config.context, max(config.tokens))
        for count in config.tokens:
            whole, in_products = 0.0, -clocks()[1]
            for _ in range(PASSES_FOR_SHARES):
                whole += _time_pass(model, cache, [0] * count)
                cache.rollback(config.context)
            shares[name, count] = 1 - (in_products + clocks()[1]) / whole
    return shares


def _filled_cache(model: CausalLM, text: list[int], room: int) -> KVCache:
    cache: KVCache = model.new_cache(len(text) + room)
    for start in range(0, len(text), CONTEXT_CHUNK):
        model.forward(text[start : start + CONTEXT_CHUNK], cache, last_only=True)
    return cache


def _time_pass(model: CausalLM, cache: KVCache, tokens: list[int]) -> float:
    """Seconds until the host knows the choice of each token, as greedy decoding runs a pass."""
    start = time.perf_counter()
    model.choose(tokens, cache)
    return time.perf_counter() - start
