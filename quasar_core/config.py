"""The configs of a run: frozen, checked once, in messages that name the flag."""

from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Literal

from quasar_core.errors import UsageError
from quasar_core.files import require_characters

VerifyMode = Literal["full", "quantized", "exact", "gated"]
VERIFY_MODES: tuple[VerifyMode, ...] = ("full", "quantized", "exact", "gated")
LEAST_FIDELITY = 0.5
MOST_TEMPERATURE = 100.0  # beyond it every token is as likely as any
PENALTIES = (0.01, 100.0)  # beyond them logits overflow
DraftKind = str  # one of DRAFT_KINDS, or a name under which another package registers a drafter
DRAFT_KINDS: tuple[DraftKind, ...] = (
    "auto",
    "none",
    "ngram",
    "suffix",
    "recycle",
    "assistant",
    "layer-skip",
    "mtp",
)
DRAFTERS_GROUP = "quasar.drafters"  # the entry points of other packages' drafters
Auto = Literal["auto"]
Offload = Literal["auto", "none", "target"]
OFFLOADS: tuple[Offload, ...] = ("auto", "none", "target")
VerifierAttention = Literal["auto", "full", "sinks+window"]
VERIFIER_ATTENTIONS: tuple[VerifierAttention, ...] = ("auto", "full", "sinks+window")
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

Method = Literal["gptq", "w8a8", "fp8"]
METHODS: tuple[Method, ...] = ("gptq", "w8a8", "fp8")
Rounding = Literal["gptq", "nearest"]
Backend = Literal["native", "optimum"]
LEAST_CONTEXT = 16  # tokens of prompt and answer
LEAST_SAMPLE = 16  # tokens of a sample that a model is calibrated on

BITS = (2, 3, 4, 8)
SAMPLES = 128
QUICK = {"samples": 16, "seq_len": 128, "fidelity_rows": 8}  # a verifier to try with; its fidelity is less certain
GROUP_SIZES = (32, 64, 128, -1)
GROUP_CHOICES = (128, 64, 32)  # by default the first of them that divides the inputs of every layer
# Beyond these, nothing is gained and memory or time never suffice.
MOST_NGRAM = 64
MOST_SAMPLES = 1_000_000
MOST_TOKENS = 10_000_000


def _check_seed(seed: int) -> None:
    """What PyTorch's generators take, with room for the seeds that are derived from it."""
    _require(abs(seed) < 2**62, f"--seed must be within 62 bits, not {seed}.")


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise UsageError(sentence)


@dataclass(frozen=True)
class SamplingConfig:
    """How a token is drawn from logits; a temperature of 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float | None = None  # None: the model's own, of its generation_config.json
    seed: int = 0

    def __post_init__(self) -> None:
        _require(
            0 <= self.temperature <= MOST_TEMPERATURE,
            f"--temperature must be from 0 to {MOST_TEMPERATURE:g}, not {self.temperature}.",
        )
        _require(self.top_k >= 0, f"--top-k must not be negative, not {self.top_k}.")
        _require(0 <= self.top_p <= 1, f"--top-p must be from 0 to 1, not {self.top_p}.")
        _require(0 <= self.min_p <= 1, f"--min-p must be from 0 to 1, not {self.min_p}.")
        penalty, (least, most) = self.repetition_penalty, PENALTIES
        _require(
            penalty is None or least <= penalty <= most,
            f"--repetition-penalty must be from {least:g} to {most:g}, not {penalty}.",
        )
        _check_seed(self.seed)

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken rather than drawn."""
        return self.temperature == 0


@dataclass(frozen=True)
class Request:
    """What one answer may ask for by itself; all else of a `GenerationConfig` is settled before the first.

    `sampling` and `stop` stand in for the config's own where they are given; the temperature is 0 in both or in
    neither.
    """

    max_new_tokens: int
    seed: int
    prediction: str = ""  # the text that is expected
    sampling: SamplingConfig | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class GenerationConfig:
    """One generation: its length, how it is verified, how it is drafted, how tokens are drawn."""

    max_new_tokens: int = 256
    verify: VerifyMode = "exact"
    draft: DraftKind = "auto"
    draft_from: tuple[str, ...] = ()  # files and folders whose text drafts are made from
    prediction: str = ""  # the text that is expected
    draft_memory: bool = False  # whether answers are kept for the drafts of later runs
    num_draft_tokens: int | Auto = "auto"
    trees: bool = True  # whether branches may stand beside a draft, where they pay
    ngram_max: int = 3
    ngram_min: int = 1
    window: int | Auto = "auto"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    processors: bool = True  # whether the logits processors of the model's generation_config.json are applied
    verifier_attention: VerifierAttention = "auto"  # what the verifier sees of a long text
    fidelity: float = 0.999  # of `gated`: the share of tokens that are to be the target's own choice

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, f"--max-new-tokens must be at least 1, not {self.max_new_tokens}.")
        _require(self.verify in VERIFY_MODES, f"--verify must be one of {', '.join(VERIFY_MODES)}, not {self.verify}.")
        self._require_drafter()
        self._require_gate()
        _require(
            self.verifier_attention in VERIFIER_ATTENTIONS,
            f"--verifier-attention must be one of {', '.join(VERIFIER_ATTENTIONS)}, not {self.verifier_attention}.",
        )
        _require(
            self.verifier_attention != "sinks+window" or self.verify != "full",
            "--verifier-attention sinks+window is the verifier's, and --verify full has none.",
        )
        if self.num_draft_tokens != "auto":
            _require(
                1 <= self.num_draft_tokens <= 64,
                f"--num-draft-tokens must be auto or from 1 to 64, not {self.num_draft_tokens}.",
            )
        if self.window != "auto":
            _require(1 <= self.window <= 256, f"--window must be auto or from 1 to 256, not {self.window}.")
        _require(
            1 <= self.ngram_min <= self.ngram_max,
            f"--ngram-min ({self.ngram_min}) must be at least 1 and at most --ngram-max ({self.ngram_max}).",
        )
        _require(self.ngram_max <= MOST_NGRAM, f"--ngram-max must be at most {MOST_NGRAM}, not {self.ngram_max}.")
        _require(all(self.stop), "--stop must not be empty.")
        for text in self.stop:
            require_characters(text, "--stop")

    @property
    def confirms(self) -> bool:
        """Whether the verifier's tokens wait for the target, all of them or those that it is not sure of."""
        return self.verify in ("exact", "gated")

    def _require_gate(self) -> None:
        _require(
            LEAST_FIDELITY <= self.fidelity < 1,
            f"--fidelity must be at least {LEAST_FIDELITY} and less than 1, not {self.fidelity}; with --verify exact "
            "nothing is lost.",
        )
        if self.verify == "gated":
            _require(self.sampling.greedy, "--verify gated decodes greedily: leave --temperature out.")
            _require(self.window == "auto", "--verify gated decides by itself what waits: leave --window out.")

    def _require_drafter(self) -> None:
        if self.draft not in DRAFT_KINDS:  # looked for only now, as that takes milliseconds
            known = [*DRAFT_KINDS, *registered_drafters()]
            _require(self.draft in known, f"--draft must be one of {', '.join(known)}, not {self.draft}.")
        for name in ("draft_from", "prediction", "draft_memory"):
            flag, given = f"--{name.replace('_', '-')}", getattr(self, name)
            _require(self.draft != "none" or not given, f"{flag} is what drafts are made from: leave --draft none out.")

    @property
    def request(self) -> Request:
        """The request of an answer that asks for nothing by itself."""
        return Request(self.max_new_tokens, self.sampling.seed, self.prediction)


def registered_drafters() -> list[str]:
    """The names under which other packages register drafters."""
    return sorted({point.name for point in entry_points(group=DRAFTERS_GROUP)})


@dataclass(frozen=True)
class LoadOptions:
    """Which pair to load, for which mode, and how."""

    model: str | None = None  # None: the current pair
    verifier: str | None = None  # None: the one recorded for the model
    verify: VerifyMode = "exact"
    draft: DraftKind = "none"  # what will be asked: where a model cannot have drafts, that is said before it is loaded
    assistant: str | None = None  # the model that drafts with `--draft assistant`
    use_target: bool = True
    device: str = "auto"
    dtype: str = "auto"
    kernel: str = "auto"
    fast: bool = False  # on a GPU, although a token's last bits may then depend on the tokens beside it
    compress: bool | None = None  # weights of bfloat16 in 12 bits, without loss, on a CPU; None: where it is faster
    max_context: int | None = None  # None: the model's own limit
    trust_remote_code: bool = False
    check_digest: bool = False  # read the verifier's files in full first
    offload: Offload = "auto"  # which of the target's blocks are streamed: those that do not fit, none, or all
    max_memory: int | None = None  # bytes that the process may take; None: what is free
    max_device_memory: int | None = None  # bytes that it may take of a GPU's; None: what is free

    def __post_init__(self) -> None:
        _require(
            self.use_target or self.verify == "quantized",
            f"--no-target goes with --verify quantized; --verify {self.verify} needs the target.",
        )
        _require(
            self.max_context is None or self.max_context >= LEAST_CONTEXT,
            f"--max-context must be at least {LEAST_CONTEXT}, not {self.max_context}.",
        )
        _require(self.offload in OFFLOADS, f"--offload must be one of {', '.join(OFFLOADS)}, not {self.offload}.")
        for flag, size in (("--max-memory", self.max_memory), ("--max-device-memory", self.max_device_memory)):
            _require(size is None or size > 0, f"{flag} must be more than nothing.")
            _require(
                self.offload != "none" or size is None, f"{flag} streams what does not fit: leave --offload none out."
            )
        _require(
            self.offload != "target" or self.use_target, "--offload target streams the target: leave --no-target out."
        )


@dataclass(frozen=True)
class QuantizeConfig:
    """One quantization: the codes, the solver's options, the calibration text."""

    bits: int = 4
    group_size: int | None = None  # None: the largest of `GROUP_CHOICES` that divides the inputs of every layer
    sym: bool = True
    act_order: bool = True
    method: Method = "gptq"
    lm_head_bits: int = 16
    calibration: str = "self"
    samples: int = SAMPLES
    seq_len: int | None = None
    damp: float = 0.05
    seed: int = 0
    backend: Backend = "native"
    mean_bits: float | None = None  # widths by layer, in the bytes that so many bits everywhere would take
    target_agreement: float | None = None  # widths by layer, in the fewest bytes that reach it
    widths: tuple[int, ...] = BITS  # that layers may have, where each has its own
    fidelity_rows: int = 32  # of held-out and of greedy text each
    rounding: Rounding = "gptq"  # codes solved by GPTQ, or every weight to the nearest

    def __post_init__(self) -> None:
        _require(self.bits in BITS, f"--bits must be one of {_listed(BITS)}, not {self.bits}.")
        _require(
            self.group_size is None or self.group_size in GROUP_SIZES,
            f"--group-size must be one of {_listed(GROUP_SIZES)}, not {self.group_size}.",
        )
        _require(self.method in METHODS, f"--method must be one of {', '.join(METHODS)}, not {self.method}.")
        _require(self.rounding in ("gptq", "nearest"), f"--rounding must be gptq or nearest, not {self.rounding}.")
        if self.reads_no_text:
            _require(not self.mixed, "--rounding nearest reads no text, and widths by layer are chosen by it.")
            _require(self.backend == "native", "--rounding nearest goes with --backend native.")
        if self.method != "gptq":
            self._require_eight_bits()
        _require(
            self.lm_head_bits in (*BITS, 16),
            f"--lm-head-bits must be one of {_listed((*BITS, 16))}, not {self.lm_head_bits}.",
        )
        self._require_mixed()
        _check_seed(self.seed)
        _require(1 <= self.samples <= MOST_SAMPLES, f"--samples must be from 1 to {MOST_SAMPLES}, not {self.samples}.")
        _require(
            self.seq_len is None or LEAST_SAMPLE <= self.seq_len <= MOST_TOKENS,
            f"--seq-len must be from {LEAST_SAMPLE} to {MOST_TOKENS}, not {self.seq_len}.",
        )
        _require(0 < self.damp < 1, f"--damp must be above 0 and below 1, not {self.damp}.")
        _require(self.backend in ("native", "optimum"), f"--backend must be native or optimum, not {self.backend}.")

    @classmethod
    def of(
        cls,
        *,
        bits: float | None = None,
        mixed: bool = False,
        method: Method = "gptq",
        group_size: int | None = None,
        target_agreement: float | None = None,
        **others: Any,
    ) -> "QuantizeConfig":
        """The config that a user asks for: `bits` may be a fraction, and None is what is usual for the method.

        With `mixed`, or a fraction, layers have widths of their own, in the bytes that `bits` everywhere would take.
        """
        usual, usual_group = default_codes(method)
        wanted = float(usual if bits is None else bits)
        searched = target_agreement is not None and bits is not None  # refused, since both choose the bits
        by_layer = mixed or searched or not wanted.is_integer()
        known = f"{_listed(BITS)}, a fraction between them, or auto"
        _require(by_layer or wanted in BITS, f"--bits must be {known}, not {wanted:g}.")
        return cls(
            bits=usual if by_layer else int(wanted),
            mean_bits=wanted if by_layer else None,
            target_agreement=target_agreement,
            group_size=usual_group if group_size is None else group_size,
            method=method,
            **others,
        )

    def _require_eight_bits(self) -> None:
        """W8A8 and fp8 leave nothing to choose about the codes."""
        fixed = {"bits": 8, "group_size": -1, "sym": True, "lm_head_bits": 16, "backend": "native"}
        for name, value in fixed.items():
            flag = f"--{name.replace('_', '-')}"
            _require(
                getattr(self, name) == value or (name == "group_size" and self.group_size is None),
                f"--method {self.method} has 8 bits and one scale per output, and leaves the head: leave {flag} out.",
            )

    def _require_mixed(self) -> None:
        """Widths by layer are GPTQ's, of our own solver."""
        if self.mean_bits is not None:
            low, high = min(BITS), max(BITS)
            _require(low <= self.mean_bits <= high, f"--bits must be from {low} to {high}, not {self.mean_bits:g}.")
        if self.target_agreement is not None:
            _require(
                0 < self.target_agreement < 1,
                f"--target-agreement must be above 0 and below 1, not {self.target_agreement:g}.",
            )
            _require(self.mean_bits is None, "--target-agreement chooses the bits: leave --bits and --mixed out.")
            _require(self.lm_head_bits == 16, "--target-agreement leaves the head: leave --lm-head-bits out.")
        listed = ",".join(map(str, self.widths))
        _require(
            bool(self.widths) and set(self.widths) <= set(BITS),
            f"--widths must be some of {_listed(BITS)}, such as 4,8, not {listed}.",
        )
        _require(
            self.mixed or self.widths == BITS,
            "--widths goes with widths by layer: a fraction for --bits, --mixed or --target-agreement.",
        )
        if self.mixed:
            flag = "--target-agreement" if self.mean_bits is None else "A mean of --bits (a fraction, or --mixed)"
            _require(
                self.method == "gptq" and self.backend == "native",
                f"{flag} goes with --method gptq and --backend native.",
            )

    @property
    def reads_no_text(self) -> bool:
        """Whether codes follow from the weights alone."""
        return self.method == "gptq" and self.rounding == "nearest"

    @property
    def texts(self) -> int:
        """Calibration texts that are read."""
        return 0 if self.reads_no_text else self.samples

    @property
    def groups_of(self) -> int:
        """The group size; the usual one until a model's layers have settled it."""
        usual = GROUP_CHOICES[0] if self.method == "gptq" else -1
        return usual if self.group_size is None else self.group_size

    @property
    def mixed(self) -> bool:
        """Whether layers have widths of their own."""
        return self.mean_bits is not None or self.target_agreement is not None

    @property
    def calibration_length(self) -> int:
        """Tokens of a calibration sample: 512 of the model's own text or the one that is at hand, else 2048."""
        return self.seq_len or (512 if self.calibration in ("self", "generic") else 2048)


def default_codes(method: str) -> tuple[int, int | None]:
    """Bits and group size where none are asked for; all that W8A8 and fp8 have. None: as the model's layers allow."""
    return (4, None) if method == "gptq" else (8, -1)


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
