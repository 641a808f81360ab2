"""Measure what passes of a loaded model cost, once: by their tokens, and by the positions before them; remember it."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from quasar_core.decode.costs.pass_costs import CONTEXT, PairCosts, PassCost
from quasar_core.kernels.times import measured_on
from quasar_core.models.base import CausalLM, KVCache
from quasar_core.models.cpu.compressed_weights import saved_bytes
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.pair import Pair
from quasar_core.store.measured import Entry, Measured, measured_file, positive, stored
from quasar_core.system import QUIET, package_version
from quasar_core.timing import Name, Sampler, Timing, time_in_turn
from quasar_core.typed import build

# The longest verify has 16 tokens and the longest confirm 33; kernels take 8 rows at a time, so that 9 cost more.
# In the order of measuring: a model so slow that the time is up within the first round is timed at both ends.
SIZES = (1, 33, 4, 16, 2, 8, 9, 17)
# Where weights are streamed a pass of any size takes long, and windows have up to 256 tokens.
STREAMED_SIZES = (1, 257, 65)
PACE = 0  # stands for a pass of the model beside them
SECONDS, SLOPE_SECONDS = 0.8, 0.4
PATIENCE = 3  # times as long where costs are held against one another
# Before one that is timed for them; less where so many would take more bytes. Many tokens come first: where there is
# time for nothing else, it is theirs.
FAR, FAR_BYTES, FAR_SIZES = 4096, 2**28, (16, 1)
# What is kept: the cost, and what it is behind so many positions more.
KIND, NAME, FURTHER, FURTHER_BY = "passes", "cost", "further", 1000

Role = Literal["target", "verifier", "assistant"]
SHOWN = (1, 4, 8)  # tokens


def cost_from_timings(timings: dict[int, Timing]) -> PassCost:
    """The cost behind timed passes of each size: the time of a longer pass bounds that of a shorter one from above."""
    sizes = sorted(timings)
    seconds = np.array([timings[size].seconds for size in sizes])
    return PassCost(tuple(sizes), tuple(np.minimum.accumulate(seconds[::-1])[::-1].tolist()))


@dataclass(frozen=True)
class Pace:
    """A model whose pass of one token usually takes so many seconds: what it takes now tells how fast the machine is.

    Memory may be twice as fast in one minute as in the next. Costs that are held against one another, but measured
    minutes apart, are those at the usual pace.
    """

    model: CausalLM
    usual: float


def measure_pass(
    pair: Pair,
    model: CausalLM,
    seconds: float | None = None,
    now: Callable[[], float] = time.perf_counter,
    pace: Pace | None = None,
) -> tuple[PassCost, str | None]:
    """Time passes of each size, in turn, until their times repeat or the time is up; and why not to keep that.

    A quiet machine needs a few rounds; a model of any size is timed at two sizes at least. With a pace that model's
    passes are timed in turn with these; where the time is up before, the machine is taken to be as fast as usual.
    """
    seconds = (PATIENCE if pace else 1) * SECONDS if seconds is None else seconds
    context = min(CONTEXT, pair.max_context // 2)
    planned = STREAMED_SIZES if model.streamed else SIZES
    sizes = [size for size in planned if context + size <= pair.max_context]
    cache = _cache_of(model, context, max(sizes))
    samplers = {size: pass_sampler(model, cache, size, now) for size in sizes}
    if pace:  # the third, as a slow model is timed at its first two sizes alone
        beside = pass_sampler(pace.model, _cache_of(pace.model, context, 1), 1, now)
        samplers = {**{size: samplers[size] for size in sizes[:2]}, PACE: beside, **samplers}
    timings = _time_passes(model, samplers, seconds, now)
    slope, trouble = measure_slope(pair, model, SLOPE_SECONDS, now)
    troubles = [*(timing.trouble for timing in timings.values()), trouble]
    factor = pace.usual / timings.pop(PACE).seconds if pace and PACE in timings else 1.0
    cost = replace(cost_from_timings(timings), slope=slope).scaled(factor)
    return cost, next(filter(None, troubles), None)


def _cache_of(model: CausalLM, context: int, room: int) -> KVCache:
    """A cache that holds so many tokens, and has room for so many more."""
    cache: KVCache = model.new_cache(context + room)
    model.forward([0] * context, cache, last_only=True)
    return cache


def measure_slope(
    pair: Pair, model: CausalLM, seconds: float, now: Callable[[], float] = time.perf_counter
) -> tuple[PassCost | None, str | None]:
    """What each position that a pass sees adds to it, and why not to keep that.

    It is None where that cannot be measured without a pass over as many tokens (models through transformers), and
    where a pass takes long whatever it sees (streamed weights); passes of a run correct that. Where the time is up with
    the first size, it is taken to grow with the tokens.
    """
    far = _far(pair, model)
    if not isinstance(model, LeanDecoder) or far <= 2 * CONTEXT:
        return None, None
    cache = model.new_cache(far + max(FAR_SIZES))
    for states in cache.layers:
        states.zero_()  # what is read takes as long whatever it is, but for numbers that are none

    def at(positions: int, size: int) -> Sampler:
        sample = pass_sampler(model, cache, size, now)

        def timed() -> float:
            cache.rollback(0)
            cache.advance(positions)
            return sample()

        return timed

    samplers = {(size, place): at(place, size) for size in FAR_SIZES for place in (CONTEXT, far)}
    timings = _time_passes(model, samplers, seconds, now)
    distance = max(positions_seen(model, far) - positions_seen(model, CONTEXT), 1.0)
    slopes = {
        size: max(timings[size, far].seconds - timings[size, CONTEXT].seconds, 0.0) / distance
        for size in FAR_SIZES
        if (size, far) in timings
    }
    slopes = {0: 0.0, **slopes} if len(slopes) == 1 else slopes
    sizes = sorted(slopes)
    slope = PassCost(tuple(sizes), tuple(np.maximum.accumulate([slopes[size] for size in sizes]).tolist()))
    return slope, next((timing.trouble for timing in timings.values() if timing.trouble), None)


def positions_seen(model: CausalLM | None, positions: int) -> float:
    """How many of the positions before a pass a layer reads, on average: some see only the last ones."""
    if not isinstance(model, LeanDecoder):
        return positions
    blocks = [block for block in model.config.blocks if block.recurrence is None]
    seen = [positions if block.window is None else min(positions, block.window + block.sinks) for block in blocks]
    return sum(seen) / max(len(seen), 1)


def _far(pair: Pair, model: CausalLM) -> int:
    """The positions before a pass that is timed for them; 0 where it is not to be timed."""
    if not isinstance(model, LeanDecoder) or model.streamed or model.config.is_recurrent:
        return 0
    one: int = sum(states.numel() * states.element_size() for states in model.new_cache(1).layers)
    limit = model.switches_at or pair.max_context  # within one table of rotations
    return min(FAR, limit - max(FAR_SIZES), FAR_BYTES // max(one, 1))


def _time_passes(
    model: CausalLM, samplers: Mapping[Name, Sampler], seconds: float, now: Callable[[], float]
) -> dict[Name, Timing]:
    on_gpu = model.device.type == "cuda"  # where the first pass of a size pays for its kernels and its graph
    timings = time_in_turn(samplers, seconds, warm_up=on_gpu, now=now)
    if on_gpu:  # other programs take its host's cores, not the GPU
        timings = {name: replace(timing, load=QUIET) for name, timing in timings.items()}
    return timings


def pass_sampler(model: CausalLM, cache: KVCache, size: int, now: Callable[[], float] = time.perf_counter) -> Sampler:
    """Seconds until the host knows the choices of a pass of `size` tokens; the cache is as before.

    Greedy decoding runs passes so. Where logits are read, by sampling or processors, writing them costs more; with
    processors the passes of the run itself correct that. The tokens differ, as those of a text do: a mixture of experts
    reads the more weights the more experts its rows choose.
    """
    tokens = [i * model.vocab_size // size for i in range(size)]

    def sample() -> float:
        length, start = cache.length, now()
        model.choose(tokens, cache)
        seconds = now() - start
        cache.rollback(length)
        return seconds

    return sample


@dataclass(frozen=True)
class CostRecord:
    """A model's cost and the conditions that it holds under; when it was measured, in seconds since 1970.

    `trouble` says in a sentence why it was not read from the disk, or is not kept there.
    """

    cost: PassCost
    conditions: dict[str, str]
    measured_at: float
    remembered: bool = False  # whether an earlier run measured it
    trouble: str | None = None

    @property
    def when(self) -> str:
        """Such as "measured now", or "remembered from 3 hours ago"."""
        said = f"remembered from {_ago(time.time() - self.measured_at)}" if self.remembered else "measured now"
        return f"{said} ({self.trouble})" if self.trouble else said

    def describe(self) -> str:
        """Whose passes take how long, and since when that is known."""
        times = ", ".join(f"{1000 * self.cost(tokens):.3g}" for tokens in SHOWN)
        sizes = ", ".join(map(str, SHOWN))
        slope = self.cost.slope
        more = f" (a token's {1e6 * slope(1):.2g} ms more behind 1000 positions)" if slope and slope(1) else ""
        return f"the {self.conditions['role']}'s passes of {sizes} tokens take {times} ms{more}, {self.when}"


def pair_costs(pair: Pair, with_verifier: bool, remeasure: bool = False) -> PairCosts:
    """The costs that a mode needs."""
    if with_verifier and pair.verifier is not None:
        verify = cost_record(pair, "verifier", remeasure).cost
        return PairCosts(verify, cost_record(pair, "target", remeasure).cost if pair.target else verify)
    alone = cost_record(pair, "target" if pair.target else "verifier", remeasure).cost
    return PairCosts(alone, alone)


def cost_record(pair: Pair, role: Role, remeasure: bool = False, pace: Pace | None = None) -> CostRecord:
    """The cost of a loaded model: known already, else remembered from the disk, else measured and kept."""
    known: CostRecord | None = pair.measured.get(role)
    if known is None or remeasure:
        known = pair.measured[role] = _remember_or_measure(pair, role, remeasure, pace)
    return known


def forget_cost(pair: Pair, role: Role) -> None:
    """Let the next run measure the passes of a model anew."""
    if _fingerprints(pair, role) is not None:
        _kept(_conditions(pair, role)).drop(NAME)


def stored_costs() -> Iterator[CostRecord]:
    """Every cost on the disk that holds for this version, the latest first; a damaged file is a QuasarError."""
    current = package_version("quasar-cli")
    records = [
        CostRecord(_whole(values), conditions, values[NAME].measured_at, remembered=True)
        for conditions, values in stored(KIND, _parse)
        if {NAME, FURTHER} <= values.keys() and conditions.get("quasar") == current
    ]
    yield from sorted(records, key=lambda record: -record.measured_at)


def _remember_or_measure(pair: Pair, role: Role, remeasure: bool, pace: Pace | None) -> CostRecord:
    model, conditions = _model(pair, role), _conditions(pair, role)
    kept = _kept(conditions) if _fingerprints(pair, role) is not None else None
    known = {name: entry for name in (NAME, FURTHER) if kept and (entry := kept.get(name))}
    if len(known) == 2 and not remeasure:
        return CostRecord(_whole(known), conditions, known[NAME].measured_at, remembered=True)
    cost, trouble = measure_pass(pair, model, pace=pace)
    if trouble:
        return CostRecord(cost, conditions, time.time(), trouble=f"not kept, as {trouble}")
    if kept:
        kept.keep({NAME: cost, FURTHER: cost.at(CONTEXT + FURTHER_BY)})
    return CostRecord(cost, conditions, time.time(), trouble=kept.trouble if kept else None)


def _whole(values: Mapping[str, Entry[PassCost]]) -> PassCost:
    cost, further = values[NAME].value, values[FURTHER].value
    if further == cost:
        return cost
    slopes = ((further(size) - seconds) / FURTHER_BY for size, seconds in zip(cost.sizes, cost.seconds, strict=True))
    return replace(cost, slope=PassCost(cost.sizes, tuple(slopes)))


def _kept(conditions: dict[str, str]) -> Measured[PassCost]:
    return Measured(measured_file(KIND, conditions), conditions, _parse, _form)


def _model(pair: Pair, role: Role) -> CausalLM:
    model = {"target": pair.target, "verifier": pair.verifier, "assistant": pair.assistant}[role]
    assert model is not None
    return model


def _fingerprints(pair: Pair, role: Role) -> dict[str, str] | None:
    """Whose cost it is; None for models that are in no files."""
    prints = {"target": pair.target_fingerprint}
    if role == "verifier":
        prints["verifier"] = pair.verifier_fingerprint
    if role == "assistant":
        prints = {"assistant": pair.assistant_fingerprint}
    return {name: value for name, value in prints.items() if value} if all(prints.values()) else None


def _conditions(pair: Pair, role: Role) -> dict[str, str]:
    model = _model(pair, role)
    kernels = sorted({layer.choice.kernel.name for layer in getattr(model, "packed_layers", ())})
    fast = getattr(model, "fast", None)
    known = getattr(model, "head_tokens", None)
    return {
        **(_fingerprints(pair, role) or {}),
        "role": role,
        "products": ", ".join(kernels) or "torch linear",
        "head": str(getattr(getattr(model, "head", None), "bits", "whole")),
        **({} if known is None else {"head of": f"{len(known)} tokens"}),
        "passes": f"{type(model).__name__}, {fast.name}" if fast else type(model).__name__,
        "quasar": package_version("quasar-cli"),
        **({"streamed": model.streamed} if model.streamed else {}),
        **({"weights": "compressed"} if isinstance(model, LeanDecoder) and saved_bytes(model) else {}),
        **measured_on(pair.device, pair.dtype),
    }


def _form(cost: PassCost) -> dict[str, float]:
    return dict(zip(map(str, cost.sizes), cost.seconds, strict=True))


def _parse(content: Any) -> PassCost:
    known = build(dict[str, float], content)
    sizes, seconds = tuple(map(int, known)), tuple(map(positive, known.values()))
    if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)) or list(seconds) != sorted(seconds):
        raise ValueError("no costs")
    return PassCost(sizes, seconds)


def _ago(seconds: float) -> str:
    for unit, length in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        count = int(seconds // length)
        if count:
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "less than a minute ago"
