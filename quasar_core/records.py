"""Record what happened: counts and seconds, and the ratios derived from them, each defined once, here."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Literal, Protocol

from quasar_core.typed import build

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Piece:
    """A run of `length` draft tokens of one drafter, the `source`; the larger its class of `sureness`, the surer.

    How often tokens are right is learned for each source and sureness, so a drafter has few classes. What a class is
    expected to reach before it was tried is that of a match of so many tokens (`draft/acceptance.py`).
    """

    source: str
    sureness: int
    length: int


LARGEST_MARGIN = 1000.0  # nats; where all other tokens are forbidden a margin is infinite


def as_recorded(margins: Sequence[float]) -> list[float]:
    """Margins as they stand in records: short, and finite."""
    return [round(min(margin, LARGEST_MARGIN), 4) for margin in margins]


@dataclass(frozen=True)
class Step:
    """One pass that checked a draft, or a token alone: draft tokens offered and accepted, the pieces of the draft.

    The verifier's, or with `by_target` the target's: always in `full`, and in `exact` where a draft went to the target
    at once. `margins` are the verifier's, of the tokens that the step added, or in `full` the target's; those of the
    target in `exact` are `target_margins`. `seconds` are the pass's, and 0 where a confirm with the same pass has
    them.
    """

    drafted: int
    accepted: int
    pieces: list[Piece] = field(default_factory=list)
    by_target: bool = False
    margins: list[float] = field(default_factory=list)
    draft_s: float = 0.0
    seconds: float = 0.0
    target_margins: list[float] = field(default_factory=list)
    let_through: int = 0  # in `gated`: tokens at the window's beginning that were committed behind this step
    left_out: list[Piece] = field(default_factory=list)  # in `exact`: what the draft had behind what was checked


@dataclass(frozen=True)
class DrafterUse:
    """What one drafter did: steps whose draft had tokens of it, such tokens, and those of them that were accepted."""

    steps: int
    drafted: int
    accepted: int


@dataclass(frozen=True)
class Confirm:
    """One confirm pass: tokens that waited in the window, and how many of them the target accepted.

    `drafted` tokens of a draft passed behind them, which are a step's as well; `step` is how many steps were before.
    `margins` are the target's, of the accepted tokens, and of its own where no step has that one; `refused` is the
    token in whose place its own stands.
    """

    window: int
    accepted: int
    drafted: int = 0
    step: int = 0
    seconds: float = 0.0
    margins: list[float] = field(default_factory=list)
    refused: int | None = None


@dataclass
class Stats:
    """Counts and seconds of one generation.

    `prefill_tokens` of the new tokens (the first one) came out of the prompt's pass and took no step. `draft_s`,
    `verify_s` and `confirm_s` are parts of `decode_s`; what is left of it is the engine's own.
    """

    new_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefill_tokens: int = 0
    step_log: list[Step] = field(default_factory=list)
    confirm_log: list[Confirm] = field(default_factory=list)
    prefill_s: float = 0.0
    decode_s: float = 0.0
    ttft_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    confirm_s: float = 0.0
    peak_memory_bytes: int = 0

    @property
    def steps(self) -> int:
        """Verify passes, and target passes that checked a draft or had no window: all after the prompt's in `full`."""
        return len(self.step_log)

    @property
    def drafted(self) -> int:
        """Draft tokens offered to the verify passes."""
        return sum(step.drafted for step in self.step_log)

    @property
    def drafted_steps(self) -> int:
        """Steps that had a draft."""
        return sum(step.drafted > 0 for step in self.step_log)

    @property
    def accepted(self) -> int:
        """Draft tokens accepted by the verify passes."""
        return sum(step.accepted for step in self.step_log)

    @property
    def confirms(self) -> int:
        """Target passes over a window."""
        return len(self.confirm_log)

    @property
    def confirm_window(self) -> int:
        """Window tokens shown to the target."""
        return sum(confirm.window for confirm in self.confirm_log)

    @property
    def confirm_accepted(self) -> int:
        """Window tokens that the target accepted."""
        return sum(confirm.accepted for confirm in self.confirm_log)

    @property
    def acceptance_length(self) -> float | None:
        """New tokens ÷ steps, bonus tokens and steps without a draft included; plain decoding is 1.00.

        The definition of the Quasar paper and of Spec-Bench. None without a step.
        """
        return (self.new_tokens - self.prefill_tokens) / self.steps if self.steps else None

    @property
    def acceptance_length_vllm(self) -> float | None:
        """vLLM's mean acceptance length: 1 + accepted ÷ drafts, over the steps that had a draft."""
        return 1 + self.accepted / self.drafted_steps if self.drafted_steps else None

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted draft tokens ÷ drafted tokens; None where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def confirm_rate(self) -> float | None:
        """Window tokens that the target accepted ÷ window tokens; None without a confirm."""
        return self.confirm_accepted / self.confirm_window if self.confirm_window else None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens that the steps yielded ÷ seconds of decoding, the prompt's pass left out."""
        return (self.new_tokens - self.prefill_tokens) / self.decode_s if self.decode_s else None

    @property
    def drafters(self) -> dict[str, DrafterUse]:
        """What each drafter did, those of the most accepted tokens first."""
        uses: dict[str, list[int]] = {}
        for step in self.step_log:
            accepted = step.accepted
            for source in {piece.source for piece in step.pieces}:
                uses.setdefault(source, [0, 0, 0])[0] += 1
            for piece in step.pieces:
                use, right = uses[piece.source], min(piece.length, accepted)
                accepted -= right
                use[1] += piece.length
                use[2] += right
        ranked = sorted(uses.items(), key=lambda item: (-item[1][2], item[0]))
        return {source: DrafterUse(*counts) for source, counts in ranked}

    def to_dict(self, logs: bool = False) -> dict[str, Any]:
        """The JSON form; with `logs`, every step and confirm too."""
        content = asdict(self)
        step_log, confirm_log = content.pop("step_log"), content.pop("confirm_log")
        for name in _DERIVED:
            content[name] = getattr(self, name)
        content["drafters"] = {source: asdict(use) for source, use in self.drafters.items()}
        if logs:
            content |= {"step_log": step_log, "confirm_log": confirm_log}
        return content

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Stats":
        """Rebuild from `to_dict(logs=True)`; derived values are computed anew."""
        return build(cls, stored_stats(content))


_DERIVED = (
    "steps",
    "drafted",
    "drafted_steps",
    "accepted",
    "confirms",
    "confirm_window",
    "confirm_accepted",
    "acceptance_length",
    "acceptance_length_vllm",
    "acceptance_rate",
    "confirm_rate",
    "tokens_per_s",
)


def stored_stats(stats: Any) -> Any:
    """What `Stats` are rebuilt from: their JSON form without derived values, steps of former files as of today's.

    Anything else stays as it is.
    """
    if not isinstance(stats, dict):
        return stats
    stored = {name: value for name, value in stats.items() if name not in (*_DERIVED, "drafters")}
    if isinstance(stored.get("step_log"), list):
        stored["step_log"] = [_step_of_today(step) for step in stored["step_log"]]
    return stored


def _step_of_today(step: Any) -> Any:
    """Former steps tell the length of an n-gram's match in place of the pieces of the draft."""
    if not isinstance(step, dict) or "match_length" not in step:
        return step
    match_length, rest = step["match_length"], {k: v for k, v in step.items() if k != "match_length"}
    pieces = [{"source": "ngram", "sureness": match_length, "length": step.get("drafted")}]
    return {"pieces": pieces if step.get("drafted") else [], **rest}


@dataclass(frozen=True)
class GenerationResult:
    """One generation: the new token ids (an end-of-text token included), their text, why it ended.

    `verified_by` is the model whose passes checked the drafts; in `exact` it may be the target itself.
    """

    prompt_token_ids: Sequence[int]
    token_ids: Sequence[int]
    text: str
    finish_reason: FinishReason
    stats: Stats
    verified_by: Literal["target", "verifier"] = "verifier"


class Progress(Protocol):
    """Told how far long work has come: `stage` is a few words, `done` of `total` its units."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Called at the start of a stage with `done` 0 and after each unit."""
        ...


def no_progress(stage: str, done: int, total: int) -> None:
    """The progress of work that nobody watches."""


Tell = Callable[[str], None]  # takes a sentence for the user


def tell_nobody(sentence: str) -> None:
    """Say a sentence where nobody listens."""


@dataclass(frozen=True)
class MarginTable:
    """P(agree | margin): how often the verifier's choice is the target's, by the verifier's margin.

    The margin is the difference of the two best logits, in nats. Bin i holds margins from edges[i − 1] to edges[i];
    there is one more bin than edges.
    """

    edges: list[float]
    counts: list[int]
    agreed: list[int]

    def __post_init__(self) -> None:
        if not len(self.counts) == len(self.agreed) == len(self.edges) + 1:
            raise ValueError(f"a margin table has {len(self.counts)} bins for {len(self.edges)} edges")
        if any(not 0 <= agreed <= count for agreed, count in zip(self.agreed, self.counts, strict=True)):
            raise ValueError("a margin table has more agreements than tokens")
        if min(self.edges, default=0.0) < 0 or not all(low < high for low, high in pairwise((*self.edges, math.inf))):
            raise ValueError("a margin table's edges do not ascend from 0")


@dataclass(frozen=True)
class FidelitySlice:
    """Agreement and mean KL in nats over some of the predicted tokens: those at some positions, those of a kind."""

    name: str
    tokens: int
    agreement: float
    kl_mean: float


@dataclass(frozen=True)
class KernelPrice:
    """What the kernel in use adds to the divergence of the codes themselves, such as by activations in 8 bits.

    Both on the same tokens; `exact` stands for products with the dequantized weight.
    """

    kernel: str
    tokens: int
    kl_mean_exact: float
    kl_mean: float
    agreement_exact: float
    agreement: float


@dataclass(frozen=True)
class FidelityReport:
    """How faithful a verifier is to its target, on text that the calibration did not see.

    `by_position` and `by_kind` split the text that the KL is taken on; `in_use` is the price of the kernel here.
    `agreement_beside` and `margins` are of greedy text read as `exact` reads it, behind whose last few tokens keys and
    values are the target's; without the former, the verifier read it alone for both, as all other text.
    """

    text: str
    tokens: int
    agreement: float
    agreement_sampled: float
    overlap: float
    kl_mean: float
    kl_p99: float
    perplexity_target: float
    perplexity_verifier: float
    margins: MarginTable
    by_position: list[FidelitySlice] = field(default_factory=list)
    by_kind: list[FidelitySlice] = field(default_factory=list)
    in_use: KernelPrice | None = None
    agreement_beside: float | None = None

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "FidelityReport":
        """Rebuild from `asdict`; what an older report does not hold stays empty. ValueError for what does not fit."""
        return build(cls, content)


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize` made: where, how large, how faithful, how long each stage took.

    `rounded_layers` are layers of experts that read too little text, which were rounded to nearest.
    """

    checkpoint: str
    target: str
    config: dict[str, Any]
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    layer_errors: dict[str, float]
    seconds: dict[str, float]
    fidelity: FidelityReport
    rounded_layers: list[str] = field(default_factory=list)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "QuantizeReport":
        """Rebuild from `asdict`."""
        return cls(**{**content, "fidelity": FidelityReport.from_dict(content["fidelity"])})
