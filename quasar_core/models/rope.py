"""Rotary position embeddings: frequencies, their scalings, and tables of cosines and sines.

With two scalings, dynamic NTK and longrope, the frequencies depend on the text's length. Up to a limit a text has the
frequencies of training. Beyond it, a token is rotated as the text that ends with it has it, and a prompt's tokens all
as the whole prompt has it; that is what transformers' `generate` does, whose first pass is the prompt and each later
one a token. Here a pass may be a piece of a prompt or several drafted tokens. Phi-3 has one other table for all tokens
of a text beyond the limit, and computes its keys anew there (`two_tables.py`).
Letters: D head size, R rotated channels of a head, T positions of a pass, P tokens of a prompt.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "alpha", "proportional", "longrope")
FIRST_ROWS = 1024


@dataclass(frozen=True)
class RopeConfig:
    """What the frequencies depend on; `options` are the scaling's own numbers, by their names in config.json."""

    kind: str
    theta: float
    head_size: int
    max_positions: int
    options: dict[str, Any] = field(default_factory=dict)
    rotated: int = 0  # channels of a head that rotate, the first ones; 0: all
    interleaved: bool = False  # channels 2i and 2i + 1 rotate together, not i and i + R/2

    @property
    def channels(self) -> int:
        """R, how many channels rotate."""
        return self.rotated or self.head_size

    @property
    def trained_positions(self) -> int:
        """Positions that the model knew before its context was extended."""
        return int(self.options.get("original_max_position_embeddings") or self.max_positions)

    @property
    def switches(self) -> bool:
        """Whether all of a text is rotated by another table where it grows beyond the limit."""
        return self.kind == "longrope"

    @property
    def limit(self) -> int | None:
        """The longest text that has the frequencies of training; None where every text has them."""
        if self.switches:
            return self.trained_positions
        return self.max_positions if self.kind == "dynamic" else None


def inverse_frequencies(rope: RopeConfig, positions: int) -> tuple[torch.Tensor, float]:
    """Frequencies [R/2] in radians per position for a text of `positions`, and a factor on cosines and sines."""
    if rope.kind == "dynamic":
        return _frequencies(_stretched_theta(rope, positions), rope.channels), 1.0
    if rope.kind == "alpha":  # of HunYuan: as dynamic scaling has it, of one stretch for all texts
        size = rope.channels
        return _frequencies(rope.theta * float(rope.options["alpha"]) ** (size / (size - 2)), size), 1.0
    if rope.kind == "proportional":
        return _proportional(rope), 1.0
    if rope.kind == "longrope":
        return _longrope(rope, positions), _longrope_magnitude(rope)
    frequencies = _frequencies(rope.theta, rope.channels)
    if rope.kind == "linear":
        return frequencies / rope.options["factor"], 1.0
    if rope.kind == "llama3":
        return _llama3(frequencies, rope), 1.0
    if rope.kind == "yarn":
        return _yarn(frequencies, rope), _yarn_magnitude(rope)
    return frequencies, 1.0


def _frequencies(theta: float, head_size: int, divisors: torch.Tensor | float = 1.0) -> torch.Tensor:
    return (divisors * torch.pow(theta, torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)).reciprocal()


def _proportional(rope: RopeConfig) -> torch.Tensor:
    """Gemma 4: the frequencies of whole heads, of which the slow ones do not turn at all."""
    frequencies = _frequencies(rope.theta, rope.head_size) / float(rope.options.get("factor") or 1)
    turning = int(float(rope.options.get("partial_rotary_factor") or 1) * rope.head_size // 2)
    frequencies[turning:] = 0
    return frequencies


def _stretched_theta(rope: RopeConfig, positions: int) -> float:
    """NTK-aware scaling that begins where the trained context ends."""
    factor, size = rope.options["factor"], rope.channels
    stretch = factor * max(positions, rope.max_positions) / rope.max_positions - (factor - 1)
    return float(rope.theta * stretch ** (size / (size - 2)))


def _llama3(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Llama 3.1: slow frequencies are divided by the factor, fast ones kept, those between them blended."""
    low, high, factor = (float(rope.options[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
    turns = rope.trained_positions * frequencies / (2 * math.pi)  # within the trained context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / factor


def _longrope(rope: RopeConfig, positions: int) -> torch.Tensor:
    """LongRoPE (Ding et al., 2024, arXiv 2402.13753): a divisor of each frequency, one set for each kind of text."""
    kind = "long_factor" if positions > rope.trained_positions else "short_factor"
    return _frequencies(rope.theta, rope.channels, torch.tensor(rope.options[kind], dtype=torch.float32))


def _longrope_magnitude(rope: RopeConfig) -> float:
    """The factor on cosines and sines, the same for short texts."""
    given, factor = rope.options.get("attention_factor"), _yarn_factor(rope)
    if given is not None:
        return float(given)
    return math.sqrt(1 + math.log(factor) / math.log(rope.trained_positions)) if factor > 1 else 1.0


def _yarn(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """YaRN (Peng et al., 2023, arXiv 2309.00071): a linear ramp over dimensions, from kept to divided frequencies."""
    low = _yarn_dimension(rope, rope.options.get("beta_fast") or 32)
    high = _yarn_dimension(rope, rope.options.get("beta_slow") or 1)
    if rope.options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.channels - 1)
    width = high - low or 0.001
    divided = ((torch.arange(rope.channels // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return divided * frequencies / _yarn_factor(rope) + (1 - divided) * frequencies


def _yarn_dimension(rope: RopeConfig, turns: float) -> float:
    """The dimension, counted in pairs, whose frequency makes that many turns within the trained context."""
    return rope.channels * math.log(rope.trained_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


def _yarn_factor(rope: RopeConfig) -> float:
    return float(rope.options.get("factor") or rope.max_positions / rope.trained_positions)


def _yarn_magnitude(rope: RopeConfig) -> float:
    """The factor on cosines and sines, by which attention keeps its temperature over a longer context."""
    given = rope.options.get("attention_factor")
    if given is not None:
        return float(given)
    scale = math.log(max(_yarn_factor(rope), 1.0))
    above, below = rope.options.get("mscale"), rope.options.get("mscale_all_dim")
    if above and below:
        return float((0.1 * above * scale + 1) / (0.1 * below * scale + 1))
    return 0.1 * scale + 1


class RopeTables:
    """Cosines and sines of all positions, computed once and extended when a longer text comes.

    A rotated head is x · cos + x' · sin, where x' holds each channel's partner in its place (`swapped`); the sines of
    the first of two partners are negated. Channels that do not rotate have a cosine of 1 and a sine of 0.
    """

    def __init__(self, rope: RopeConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.rope, self.device, self.dtype = rope, device, dtype
        self._usual = rope.limit or rope.max_positions  # the length of texts that have the frequencies of training
        self._cos, self._sin = self._compute(0, FIRST_ROWS, self._usual)
        self._long: tuple[torch.Tensor, torch.Tensor] | None = None  # of texts beyond the limit, where these are alike

    def reach(self, end: int) -> None:
        """Make room for positions below `end`."""
        if end > self._cos.shape[0]:
            rows = max(end, 2 * self._cos.shape[0])
            self._cos, self._sin = self._compute(0, rows, self._usual)

    @property
    def limit(self) -> int | None:
        """See `RopeConfig`."""
        return self.rope.limit

    def rows(self, start: int, end: int, prompt_length: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [T, 1, D] of the positions of a pass in a text whose prompt has `prompt_length` tokens.

        Beyond its limit, dynamic scaling rotates a token as the text that ends with it, and a prompt as a whole has it.
        """
        if self.stretches_at(end, prompt_length) and self.rope.switches:
            return self._long_rows(start, end)
        if self.stretches_at(end, prompt_length):
            runs = spans(start, end, prompt_length, self.rope.max_positions)
            cos, sin = zip(*(self._compute(*run) for run in runs), strict=True)
            return torch.cat(cos), torch.cat(sin)
        self.reach(end)
        return self._cos[start:end], self._sin[start:end]

    def _long_rows(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._long is None or len(self._long[0]) < end:
            self._long = self._compute(0, end + FIRST_ROWS, self._usual + 1)
        cos, sin = self._long
        return cos[start:end], sin[start:end]

    def stretches_at(self, end: int, prompt_length: int = 0) -> bool:
        """Whether some of the frequencies before `end` are not those of training."""
        return self.limit is not None and max(end, prompt_length) > self.limit

    def _compute(self, start: int, end: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        frequencies, magnitude = inverse_frequencies(self.rope, positions)
        angles = torch.arange(start, end, dtype=torch.float32)[:, None] * frequencies
        cos, sin = angles.cos() * magnitude, angles.sin() * magnitude
        tables = self._spread(cos, cos, 1.0), self._spread(-sin, sin, 0.0)
        return tables[0][:, None].to(self.device, self.dtype), tables[1][:, None].to(self.device, self.dtype)

    def _spread(self, first: torch.Tensor, second: torch.Tensor, still: float) -> torch.Tensor:
        """Values of the first and the second of partners, [T, R/2] each, in their channels' places [T, D]."""
        rope = self.rope
        moving = torch.stack((first, second), -1).flatten(1) if rope.interleaved else torch.cat((first, second), -1)
        return torch.nn.functional.pad(moving, (0, rope.head_size - rope.channels), value=still)


def swapped(x: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Heads [..., D] with each channel's partner of a rotation in its place."""
    size = rope.channels
    if rope.interleaved:
        moved = x[..., :size].unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        moved = x[..., :size].roll(size // 2, -1)
    return moved if size == rope.head_size else torch.cat((moved, x[..., size:]), -1)


def query_growth(positions: torch.Tensor, beta: float, trained: int) -> torch.Tensor:
    """How queries at these positions grow beyond the trained context (Llama 4's rule), in float32."""
    return 1 + beta * torch.log1p(torch.floor(positions.float() / trained))


@runtime_checkable
class TextCache(Protocol):
    """A cache that wants to know how long the prompt is."""

    def begin(self, prompt_length: int) -> int:
        """A text with a prompt of this many tokens begins; how many of the positions written are right in it too."""
        ...


def begin_text(cache: object, prompt_length: int, kept: int) -> int:
    """Tell the cache, which holds the first `kept` tokens of the text, of its prompt; how many of them stay."""
    return cache.begin(prompt_length) if isinstance(cache, TextCache) else kept


class PromptLength:
    """What a cache remembers of the prompt; a base of caches that have a `length` and a `rollback`."""

    limit: int | None = None  # of texts with the frequencies of training; None where all have them
    prompt_length = 0

    def begin(self, prompt_length: int) -> int:
        """See `TextCache`: beyond the limit, keys were rotated as another prompt has it."""
        if self.limit is not None and max(self.prompt_length, prompt_length) > self.limit:
            self.rollback(0)
        self.prompt_length = prompt_length
        return self.length

    @property
    def length(self) -> int:
        """Positions written."""
        raise NotImplementedError

    def rollback(self, length: int) -> None:
        """Forget the positions from `length` on."""
        raise NotImplementedError


def spans(start: int, end: int, prompt_length: int, limit: int) -> Iterator[tuple[int, int, int]]:
    """The positions of a pass in runs of one text length, which is `limit` for all texts up to it."""
    shared = max(prompt_length, limit)
    if start < shared:
        yield start, min(end, shared), shared
    for position in range(max(start, shared), end):
        yield position, position + 1, position + 1
