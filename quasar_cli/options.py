"""The options that several commands share, each described once, and the groups that commands take them in."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from quasar_core.config import (
    Auto,
    DraftKind,
    Dtype,
    GenerationConfig,
    LoadOptions,
    Offload,
    SamplingConfig,
    VerifierAttention,
    VerifyMode,
)
from quasar_core.errors import UsageError

_MODEL, _DECODING, _SAMPLING = "Model", "Speculation", "Sampling"


class Reporting:
    """Whether an error is to be shown with its traceback; set by `-v` of the command that runs."""

    tracebacks = False


def _remember_verbose(verbose: bool) -> bool:
    Reporting.tracebacks = verbose
    return verbose


def parse_auto(flag: str, value: str) -> int | Auto:
    """`auto` or a whole number; UsageError that names the flag."""
    if value == "auto":
        return "auto"
    try:
        return int(value)
    except ValueError:
        raise UsageError(f"{flag} must be auto or a whole number, not {value}.") from None


def parse_size(flag: str, value: str | None) -> int | None:
    """The bytes of a size such as 6GB, where one is given; UsageError that names the flag."""
    if value is None:
        return None
    from quasar_core import api

    return api.parse_bytes(flag, value)


def use_threads(value: str, steer: bool = False) -> None:
    """Compute in as many threads as --threads says; with `steer`, `auto` follows the machine's load."""
    number = parse_auto("--threads", value)
    from quasar_core import api

    api.use_threads(number, steer)


# Every command.
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", callback=_remember_verbose, help="Say what was chosen and why; show tracebacks of errors."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Threads = Annotated[
    str,
    typer.Option(
        "--threads", metavar="N|auto", help="Threads of the CPU; auto: one for each core, fewer while cores are busy."
    ),
]

# Which models, where they run.
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="A folder, hub id, bare name or demo; default: the current pair.",
        rich_help_panel=_MODEL,
    ),
]
Adapter = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        metavar="FOLDER",
        help="A LoRA, as peft writes it, that is merged into MODEL first.",
        rich_help_panel=_MODEL,
    ),
]
Verifier = Annotated[
    str | None,
    typer.Option(
        "--verifier",
        metavar="FOLDER",
        help="The low-bit copy; default: the one quantize wrote for MODEL.",
        rich_help_panel=_MODEL,
    ),
]
Assistant = Annotated[
    str | None,
    typer.Option(
        "--assistant",
        metavar="MODEL",
        help="A small model of the same vocabulary that drafts, for --draft assistant and the bench's arms.",
        rich_help_panel=_MODEL,
    ),
]
Device = Annotated[
    str, typer.Option("--device", metavar="auto|cpu|cuda|cuda:N", help="Where to compute.", rich_help_panel=_MODEL)
]
Precision = Annotated[Dtype, typer.Option("--dtype", help="What weights are computed in.", rich_help_panel=_MODEL)]
Kernel = Annotated[
    str,
    typer.Option(
        "--kernel",
        metavar="auto|NAME",
        help="What runs the packed layers; `quasar doctor` lists them.",
        rich_help_panel=_MODEL,
    ),
]
Fast = Annotated[
    bool,
    typer.Option(
        "--fast/--deterministic",
        help="On a GPU, what is fastest; else no bit of a token depends on those beside it.",
        rich_help_panel=_MODEL,
    ),
]
MaxContext = Annotated[
    int | None,
    typer.Option(
        "--max-context",
        help="The most tokens of prompt and answer; fewer than the model's own limit save memory.",
        rich_help_panel=_MODEL,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run Python code that the model's folder carries.", rich_help_panel=_MODEL
    ),
]
CheckDigest = Annotated[
    bool,
    typer.Option(
        "--check-digest",
        help="Read the verifier's files in full first, and refuse them if they are not as quantize wrote them.",
        rich_help_panel=_MODEL,
    ),
]
OffloadOption = Annotated[
    Offload,
    typer.Option(
        "--offload",
        help="Which of the target's blocks are read from its files at each pass: what does not fit, none, or all.",
        rich_help_panel=_MODEL,
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        help="The most memory to take, such as 6GB; target blocks beyond it are streamed; default: what is free.",
        rich_help_panel=_MODEL,
    ),
]
UseTarget = Annotated[
    bool,
    typer.Option(
        "--target/--no-target",
        help="With --verify quantized: leave the full-precision model out of memory.",
        rich_help_panel=_MODEL,
    ),
]

# How tokens are decided, drafted and drawn.
Verify = Annotated[
    VerifyMode,
    typer.Option(
        "--verify",
        help="Who decides each token; in exact the verifier proposes and the target confirms: nothing is lost. In "
        "gated tokens that the verifier is sure of are not confirmed.",
        rich_help_panel=_DECODING,
    ),
]
Fidelity = Annotated[
    float,
    typer.Option(
        "--fidelity",
        help="With gated: the share of tokens that are to be the full-precision model's own choice.",
        rich_help_panel=_DECODING,
    ),
]
Draft = Annotated[
    str,
    typer.Option(
        "--draft",
        metavar="auto|none|ngram|suffix|NAME",
        help="Who guesses the next tokens, or recycle, assistant, layer-skip; packages may add names.",
        rich_help_panel=_DECODING,
    ),
]
DraftFrom = Annotated[
    list[str] | None,
    typer.Option(
        "--draft-from",
        metavar="FILE|FOLDER",
        help="Text that answers may repeat, such as the code at hand; may be given again.",
        rich_help_panel=_DECODING,
    ),
]
DraftMemory = Annotated[
    bool,
    typer.Option(
        "--draft-memory",
        help="Keep answers on this machine for the drafts of later runs; `quasar models forget` removes them.",
        rich_help_panel=_DECODING,
    ),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="The most tokens to generate.")]
NumDraftTokens = Annotated[
    str, typer.Option("--num-draft-tokens", metavar="N|auto", help="Tokens of a draft.", rich_help_panel=_DECODING)
]
SeenByVerifier = Annotated[
    VerifierAttention,
    typer.Option(
        "--verifier-attention",
        help="What the verifier sees of a long text: all, its first few and last 512 positions, or what is faster.",
        rich_help_panel=_DECODING,
    ),
]
Trees = Annotated[
    bool,
    typer.Option(
        "--trees/--no-trees",
        help="Whether likely tokens are checked beside a draft's, where that pays.",
        rich_help_panel=_DECODING,
    ),
]
NgramMax = Annotated[
    int,
    typer.Option("--ngram-max", help="The longest context that a draft is looked up by.", rich_help_panel=_DECODING),
]
NgramMin = Annotated[
    int,
    typer.Option("--ngram-min", help="The shortest context that a draft is looked up by.", rich_help_panel=_DECODING),
]
Window = Annotated[
    str, typer.Option("--window", metavar="N|auto", help="Tokens that wait for a confirm.", rich_help_panel=_DECODING)
]
Temperature = Annotated[
    float, typer.Option("--temperature", "-t", help="0 takes the best token; above 0 draws.", rich_help_panel=_SAMPLING)
]
TopK = Annotated[
    int, typer.Option("--top-k", help="Draw from the K best tokens; 0 for all.", rich_help_panel=_SAMPLING)
]
TopP = Annotated[
    float, typer.Option("--top-p", help="Draw from the best tokens that hold this share.", rich_help_panel=_SAMPLING)
]
MinP = Annotated[
    float, typer.Option("--min-p", help="Leave out tokens below this share of the best one.", rich_help_panel=_SAMPLING)
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty",
        help="Above 1 discourages repetition; default: the model's own, else 1.",
        rich_help_panel=_SAMPLING,
    ),
]
Processors = Annotated[
    bool,
    typer.Option(
        "--processors/--no-processors",
        help="Apply the logits processors of the model's generation_config.json, as transformers does.",
        rich_help_panel=_SAMPLING,
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Fixes every random choice.", rich_help_panel=_SAMPLING)]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="Text that ends the answer; may be given again."),
]

# The prompt and the answer.
System = Annotated[
    str | None,
    typer.Option("--system", help="The system message of the chat template."),
]
Think = Annotated[
    bool | None,
    typer.Option("--think/--no-think", help="For models that can: think first, or not; default: the template's own."),
]
Stream = Annotated[bool, typer.Option("--stream/--no-stream", help="Print text as it comes, or at the end.")]
ShowStats = Annotated[bool, typer.Option("--stats/--no-stats", help="Print what the generation gained.")]
Trace = Annotated[
    str | None,
    typer.Option(
        "--trace",
        metavar="[FILE.json]",
        help="Show who made each token: in the terminal, or in a file for `quasar bench report`.",
    ),
]
Folder = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FOLDER", help="Where the verifier goes; default: beside the target."),
]


@dataclass(frozen=True)
class ModelOptions:
    """Which pair to load, and where."""

    model: Model = None
    adapter: Adapter = None
    verifier: Verifier = None
    assistant: Assistant = None
    use_target: UseTarget = True
    device: Device = "auto"
    dtype: Precision = "auto"
    kernel: Kernel = "auto"
    fast: Fast = False
    max_context: MaxContext = None
    trust_remote_code: TrustRemoteCode = False
    check_digest: CheckDigest = False
    offload: OffloadOption = "auto"
    max_memory: MaxMemory = None
    threads: Threads = "auto"

    def to_load(self, verify: VerifyMode, draft: DraftKind = "none") -> LoadOptions:
        """What is to be loaded for a mode."""
        apart = ("threads", "adapter", "max_memory")
        chosen = {name: value for name, value in vars(self).items() if name not in apart}
        chosen["model"] = with_adapter(self.model, self.adapter)
        return LoadOptions(**chosen, max_memory=parse_size("--max-memory", self.max_memory), verify=verify, draft=draft)


def with_adapter(model: str | None, adapter: Path | None) -> str | None:
    """The model's name, or the folder into which an adapter was merged with it."""
    if adapter is None:
        return model
    if model is None:
        raise UsageError("--adapter needs --model MODEL, the model that it was trained on.")
    from quasar_cli import console
    from quasar_core import api

    with console.progress_bar() as progress:
        return api.merge_adapter(model, adapter, progress)


@dataclass(frozen=True)
class DecodeOptions:
    """How to generate: the options that make a GenerationConfig."""

    max_new_tokens: MaxNewTokens = 256
    stop: Stop = None
    verify: Verify = "exact"
    fidelity: Fidelity = 0.999
    draft: Draft = "auto"
    draft_from: DraftFrom = None
    draft_memory: DraftMemory = False
    num_draft_tokens: NumDraftTokens = "auto"
    trees: Trees = True
    verifier_attention: SeenByVerifier = "auto"
    ngram_max: NgramMax = 3
    ngram_min: NgramMin = 1
    window: Window = "auto"
    temperature: Temperature = 0.0
    top_k: TopK = 0
    top_p: TopP = 1.0
    min_p: MinP = 0.0
    repetition_penalty: RepetitionPenalty = None
    processors: Processors = True
    seed: Seed = 0

    def config(self) -> GenerationConfig:
        """The checked config; UsageError for a value that cannot be."""
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            verify=self.verify,
            draft=self.draft,
            draft_from=tuple(self.draft_from or ()),
            draft_memory=self.draft_memory,
            num_draft_tokens=parse_auto("--num-draft-tokens", self.num_draft_tokens),
            trees=self.trees,
            verifier_attention=self.verifier_attention,
            ngram_max=self.ngram_max,
            ngram_min=self.ngram_min,
            window=parse_auto("--window", self.window),
            sampling=SamplingConfig(
                self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, self.seed
            ),
            stop=tuple(self.stop or ()),
            processors=self.processors,
            fidelity=self.fidelity,
        )


def takes_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take its options in groups: a parameter typed as a dataclass becomes one option per field."""
    groups: dict[str, Any] = {}
    flat: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if is_dataclass(parameter.annotation):
            groups[name] = parameter.annotation
            flat += _field_parameters(parameter.annotation)
        else:
            flat.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def with_flat_options(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    flattened: Any = with_flat_options
    flattened.__signature__ = inspect.Signature(flat)
    flattened.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return with_flat_options


def _field_parameters(group: Any) -> list[inspect.Parameter]:
    """One keyword parameter for each field of an option group; every field has a default."""
    return [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(group)
    ]
