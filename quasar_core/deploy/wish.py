"""The options of `quasar deploy`, checked once, and the command that follows from them."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from quasar_core.config import Auto
from quasar_core.errors import UsageError

Engine = Literal["vllm", "sglang"]
Mode = Literal["exact", "quantized"]
DraftBy = Literal["auto", "draft-model", "quasar", "ngram", "suffix", "none"]
NAMES: dict[Engine, str] = {"vllm": "vLLM", "sglang": "SGLang"}
# What each engine drafts with in each mode; the first is taken by default.
DRAFTS: dict[tuple[Engine, Mode], tuple[DraftBy, ...]] = {
    ("vllm", "exact"): ("draft-model", "quasar", "ngram", "suffix", "none"),
    ("vllm", "quantized"): ("ngram", "suffix", "none"),
    ("sglang", "exact"): ("draft-model", "ngram", "none"),
    ("sglang", "quantized"): ("ngram", "none"),
}
USUAL_LENGTH: dict[DraftBy, int] = {"draft-model": 4, "quasar": 16, "ngram": 8, "suffix": 24, "none": 0}
MOST_RANKS, MOST_DRAFTED, LARGEST_PORT = 1024, 64, 65535


@dataclass(frozen=True)
class Wish:
    """An engine, a mode, and options; `python` is that of the engine's environment, by default this one."""

    engine: Engine = "vllm"
    mode: Mode = "exact"
    draft: DraftBy = "auto"
    tensor_parallel: int = 1
    num_draft_tokens: int | None = None
    window: int | Auto = "auto"
    draft_from: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    max_context: int | None = None
    dtype: str = "auto"
    python: Path | None = None
    others: tuple[str, ...] = ()  # further words for the engine

    def __post_init__(self) -> None:
        possible = DRAFTS[self.engine, self.mode]
        _require(
            self.draft in ("auto", *possible),
            f"--draft {self.draft} is not to be had with --engine {self.engine} --mode {self.mode}: "
            f"it may be {', '.join(possible)}.",
        )
        _require_within("--tensor-parallel", self.tensor_parallel, MOST_RANKS)
        _require_within("--num-draft-tokens", self.num_draft_tokens, MOST_DRAFTED)
        _require_within("--max-context", self.max_context, None)
        _require_within("--port", self.port, LARGEST_PORT)
        for flag, given in (("--draft-from", self.draft_from), ("--window", self.window != "auto")):
            _require(not given or self.drafts_by == "quasar", f"{flag} is for drafts by quasar: add --draft quasar.")

    @property
    def drafts_by(self) -> DraftBy:
        """Who drafts."""
        return DRAFTS[self.engine, self.mode][0] if self.draft == "auto" else self.draft

    @property
    def draft_length(self) -> int:
        """The most tokens of a draft."""
        return self.num_draft_tokens or USUAL_LENGTH[self.drafts_by]

    @property
    def loads_verifier(self) -> bool:
        """Whether the engine itself loads the low-bit copy, so that its rules for checkpoints count."""
        return self.mode == "quantized" or self.drafts_by == "draft-model"


@dataclass(frozen=True)
class Files:
    """Where the engine finds the models: folders, or the target's hub id."""

    target: str
    verifier: str


@dataclass(frozen=True)
class Command:
    """What starts the engine: variables, words, and those of its parts that are JSON, by their options."""

    words: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, *map(shlex.quote, self.words)])


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise UsageError(sentence)


def _require_within(flag: str, value: int | None, most: int | None) -> None:
    ends = f"from 1 to {most}" if most else "at least 1"
    _require(value is None or (value >= 1 and (most is None or value <= most)), f"{flag} must be {ends}, not {value}.")
