"""What a pass of T tokens costs, against the floor: the bytes it must read ÷ the bandwidth of the same run.

Letters: T tokens of a pass.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quasar_core.bench.bandwidth import read_bandwidth
from quasar_core.bench.environment import git_hash, package_versions
from quasar_core.bench.step_lineup import Lineup, Subject, cache_bytes
from quasar_core.errors import QuasarError, UsageError
from quasar_core.files import read_json, write_json
from quasar_core.kernels.identity import device_name
from quasar_core.models.base import CausalLM, KVCache
from quasar_core.records import Progress, no_progress
from quasar_core.timing import Sampler, Timing, time_in_turn
from quasar_core.writing import refuse_foreign

MOST_TOKENS = 256
PROMPT_CHUNK = 256
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


def measure_steps(lineup: Lineup, config: StepConfig, progress: Progress = no_progress) -> StepReport:
    """Time all passes of all models, interleaved, between two probes of the bandwidth."""
    shape, itemsize = lineup.shape, lineup.dtype.itemsize
    device = next(iter(lineup.subjects.values())).model.device
    before = read_bandwidth(device)
    models = {name: subject.model for name, subject in lineup.subjects.items()}
    samples = time_passes(models, config, progress)
    bandwidth = before, read_bandwidth(device)
    outside = shares_outside_products(models, config)
    states = {count: cache_bytes(shape, config.context + count, itemsize) for count in config.tokens}
    return StepReport(
        name=lineup.name,
        layers=shape.num_layers,
        all_layers=lineup.all_layers,
        config=config,
        device=device_name(device),
        dtype=str(lineup.dtype).removeprefix("torch."),
        versions=package_versions(),
        git=git_hash(),
        bandwidth=bandwidth,
        rows=list(step_rows(samples, lineup.subjects, states, bandwidth, outside)),
        others=next(iter(samples.values())).load.others,
    )


def step_rows(
    samples: Samples,
    subjects: Mapping[str, Subject],
    states: Mapping[int, int],
    bandwidth: tuple[float, float],
    outside: Mapping[tuple[str, int], float],
) -> Iterator[StepRow]:
    """The rows behind samples; `states` are the bytes of keys and values by T."""
    for (name, tokens), timing in samples.items():
        size = subjects[name].weight_bytes + states[tokens]
        yield StepRow(
            model=name,
            tokens=tokens,
            ms=1000 * timing.median,
            bytes=size,
            floor_ms=1000 * size / max(bandwidth),
            slow_floor_ms=1000 * size / min(bandwidth),
            kernel=subjects[name].kernel,
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
    for start in range(0, len(text), PROMPT_CHUNK):
        model.forward(text[start : start + PROMPT_CHUNK], cache, last_only=True)
    return cache


def _time_pass(model: CausalLM, cache: KVCache, tokens: list[int]) -> float:
    """Seconds until the logits of all tokens can be read."""
    start = time.perf_counter()
    model.forward(tokens, cache)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - start
