"""Know the cost of a pass of T tokens, in seconds: measured once, remembered, and corrected while decoding."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from quasar_core.kernels.times import measured_on
from quasar_core.models.base import CausalLM, KVCache
from quasar_core.models.compressed_weights import saved_bytes
from quasar_core.models.decoder import LeanDecoder
from quasar_core.models.pair import Pair
from quasar_core.store.measured import Measured, measured_file, positive, stored
from quasar_core.system import QUIET, package_version
from quasar_core.timing import Sampler, Timing, time_in_turn
from quasar_core.typed import build

# The longest verify has 16 tokens and the longest confirm 33; kernels take 8 rows at a time, so that 9 cost more.
# In the order of measuring: a model so slow that the time is up within the first round is timed at both ends.
SIZES = (1, 33, 4, 16, 2, 8, 9, 17)
# Where weights are streamed a pass of any size takes long, and windows have up to 256 tokens.
STREAMED_SIZES = (1, 257, 65)
SECONDS = 0.8
CONTEXT = 64
KIND, NAME = "passes", "cost"

# Passes of this run that count: so many of the latest of a size, none of them older than so many passes.
RECENT, OLD = 16, 64
KNOWN = 3  # of a size, from which on they count more than what was measured before
FEW, OLD_FEW = 8, 24  # of a size so few that all may have been disturbed: they count no longer than this
# Times what decoding sees, either way: what was remembered is not believed of other sizes, and not kept.
DOUBTFUL, WRONG = 1.5, 2.0
TABLE = 65  # tokens of passes whose remembered cost is looked up

Role = Literal["target", "verifier", "assistant"]
SHOWN = (1, 4, 8)  # tokens


class Cost(Protocol):
    """Seconds of a pass."""

    def __call__(self, tokens: int) -> float:
        """Seconds of a pass of `tokens` tokens."""
        ...


@dataclass(frozen=True)
class PassCost:
    """Seconds of a pass, at some sizes; between them linear, beyond the last along the last slope."""

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    def __call__(self, tokens: int) -> float:
        """Seconds of a pass of `tokens` tokens."""
        if tokens > self.sizes[-1] and len(self.sizes) > 1:
            slope = (self.seconds[-1] - self.seconds[-2]) / (self.sizes[-1] - self.sizes[-2])
            return self.seconds[-1] + max(slope, 0.0) * (tokens - self.sizes[-1])
        return float(np.interp(tokens, self.sizes, self.seconds))


@dataclass(frozen=True)
class PairCosts:
    """Costs of the verify pass and of the confirm pass; the same model's in a mode without a verifier."""

    verify: Cost
    confirm: Cost


class LiveCost:
    """A known cost, corrected by the times of the passes themselves.

    Of each class of sizes (1, 2, 3–4, 5–8, …) the latest passes are kept as multiples of the known cost; the first
    eighth of them ends at the correction, since other work only ever adds to a time. A class that was not seen lately
    goes by those that were: where the machine has become slower as a whole, all costs rise alike. Passes of a single
    token are the measure of the others, and are not forgotten.
    """

    def __init__(self, known: Cost) -> None:
        self.known = known
        self.passes = 0
        self._table = [known(tokens) for tokens in range(TABLE)]
        self._recent: defaultdict[int, deque[tuple[int, float]]] = defaultdict(lambda: deque(maxlen=RECENT))
        self._corrections: dict[int, float] = {}

    def __call__(self, tokens: int) -> float:
        """Seconds of a pass of `tokens` tokens; more never cost less than one."""
        corrected = self._known(tokens) * self._correction(_size_class(tokens))
        return corrected if tokens <= 1 or self.seen(1) < KNOWN else max(corrected, self(1))

    def observe(self, tokens: int, seconds: float) -> None:
        """A pass of `tokens` tokens took so long."""
        self.passes += 1
        self._recent[_size_class(tokens)].append((self.passes, seconds / self._known(tokens)))
        self._corrections.clear()
        if self.passes % FEW == 0:
            self._forget_old()

    def seen(self, tokens: int) -> int:
        """How many passes of about this size count."""
        return len(self._recent[_size_class(tokens)])

    @property
    def since_single(self) -> int:
        """Passes since the last one of a single token; all where there was none."""
        return self.passes - (self._recent[0][-1][0] if self._recent[0] else 0)

    @property
    def is_doubtful(self) -> bool:
        """Whether passes of a single token have cost something else than what was known."""
        return not 1 / DOUBTFUL <= self._correction(0) <= DOUBTFUL

    @property
    def contradicts(self) -> bool:
        """Whether many passes of a single token say that what was known is wrong."""
        return self.seen(1) >= RECENT // 2 and not 1 / WRONG <= self._correction(0) <= WRONG

    def _known(self, tokens: int) -> float:
        return self._table[tokens] if tokens < TABLE else self.known(tokens)

    def _correction(self, size: int) -> float:
        found = self._corrections.get(size)
        if found is None:
            found = self._corrections[size] = self._find_correction(size)
        return found

    def _find_correction(self, size: int) -> float:
        """Of a class that was seen often enough its own; else what lies between its neighbours', 1 where none was."""
        seen = sorted(other for other, recent in self._recent.items() if len(recent) >= KNOWN)
        below, above = [other for other in seen if other <= size][-1:], [other for other in seen if other >= size][:1]
        if not seen or (size == 0 and not below):
            return 1.0
        low, high = (below or above)[0], (above or below)[0]
        share = (size - low) / (high - low) if high > low else 0.0
        return (1 - share) * self._lowest(low) + share * self._lowest(high)

    def _lowest(self, size: int) -> float:
        multiples = sorted(multiple for _, multiple in self._recent[size])
        return multiples[len(multiples) // 8]

    def _forget_old(self) -> None:
        for size, recent in self._recent.items():
            while size and recent and self.passes - recent[0][0] > (OLD if len(recent) >= FEW else OLD_FEW):
                recent.popleft()


def _size_class(tokens: int) -> int:
    return (tokens - 1).bit_length()


def cost_from_timings(timings: dict[int, Timing]) -> PassCost:
    """The cost behind timed passes of each size: the time of a longer pass bounds that of a shorter one from above."""
    sizes = sorted(timings)
    seconds = np.array([timings[size].seconds for size in sizes])
    return PassCost(tuple(sizes), tuple(np.minimum.accumulate(seconds[::-1])[::-1].tolist()))


def measure_pass(
    pair: Pair, model: CausalLM, seconds: float = SECONDS, now: Callable[[], float] = time.perf_counter
) -> tuple[PassCost, str | None]:
    """Time passes of each size, in turn, until their times repeat or the time is up; and why not to keep that.

    A quiet machine needs a few rounds; a model of any size is timed at two sizes at least.
    """
    context = min(CONTEXT, pair.max_context // 2)
    planned = STREAMED_SIZES if model.streamed else SIZES
    sizes = [size for size in planned if context + size <= pair.max_context]
    cache = model.new_cache(context + max(sizes))
    model.forward([0] * context, cache, last_only=True)
    on_gpu = model.device.type == "cuda"  # where the first pass of a size pays for its kernels and its graph
    samplers = {size: pass_sampler(model, cache, size, now) for size in sizes}
    timings = time_in_turn(samplers, seconds, warm_up=on_gpu, now=now)
    if on_gpu:  # other programs take its host's cores, not the GPU
        timings = {size: replace(timing, load=QUIET) for size, timing in timings.items()}
    return cost_from_timings(timings), next((timing.trouble for timing in timings.values() if timing.trouble), None)


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
        return f"the {self.conditions['role']}'s passes of {sizes} tokens take {times} ms, {self.when}"


def pair_costs(pair: Pair, with_verifier: bool, remeasure: bool = False) -> PairCosts:
    """The costs that a mode needs."""
    if with_verifier and pair.verifier is not None:
        verify = cost_record(pair, "verifier", remeasure).cost
        return PairCosts(verify, cost_record(pair, "target", remeasure).cost if pair.target else verify)
    alone = cost_record(pair, "target" if pair.target else "verifier", remeasure).cost
    return PairCosts(alone, alone)


def cost_record(pair: Pair, role: Role, remeasure: bool = False) -> CostRecord:
    """The cost of a loaded model: known already, else remembered from the disk, else measured and kept."""
    known: CostRecord | None = pair.measured.get(role)
    if known is None or remeasure:
        known = pair.measured[role] = _remember_or_measure(pair, role, remeasure)
    return known


def forget_cost(pair: Pair, role: Role) -> None:
    """Let the next run measure the passes of a model anew."""
    if _fingerprints(pair, role) is not None:
        _kept(_conditions(pair, role)).drop(NAME)


def stored_costs() -> Iterator[CostRecord]:
    """Every cost on the disk that holds for this version, the latest first; a damaged file is a QuasarError."""
    current = package_version("quasar-cli")
    records = [
        CostRecord(values[NAME].value, conditions, values[NAME].measured_at, remembered=True)
        for conditions, values in stored(KIND, _parse)
        if NAME in values and conditions.get("quasar") == current
    ]
    yield from sorted(records, key=lambda record: -record.measured_at)


def _remember_or_measure(pair: Pair, role: Role, remeasure: bool) -> CostRecord:
    model, conditions = _model(pair, role), _conditions(pair, role)
    kept = _kept(conditions) if _fingerprints(pair, role) is not None else None
    known = kept.get(NAME) if kept and not remeasure else None
    if known:
        return CostRecord(known.value, conditions, known.measured_at, remembered=True)
    cost, trouble = measure_pass(pair, model)
    if trouble:
        return CostRecord(cost, conditions, time.time(), trouble=f"not kept, as {trouble}")
    if kept:
        kept.keep({NAME: cost})
    return CostRecord(cost, conditions, time.time(), trouble=kept.trouble if kept else None)


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
    return {
        **(_fingerprints(pair, role) or {}),
        "role": role,
        "products": ", ".join(kernels) or "torch linear",
        "head": str(getattr(getattr(model, "head", None), "bits", "whole")),
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
