"""The options that several commands share, each described once (`option_groups.py` puts them in groups)."""

from pathlib import Path
from typing import Annotated

import typer

from quasar_core.config import (
    Auto,
    Dtype,
    Offload,
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
    return parse_bytes(flag, value)


def parse_bytes(flag: str, text: str) -> int:
    """A size such as 8GB, 500MB or 8e9; UsageError that names the flag."""
    units = {"gb": 10**9, "mb": 10**6, "kb": 10**3, "gib": 2**30, "mib": 2**20, "kib": 2**10, "b": 1}
    number, factor = text.strip().lower(), 1
    for unit, size in units.items():
        if number.endswith(unit):
            number, factor = number.removesuffix(unit).strip(), size
            break
    try:
        value = int(float(number) * factor)
    except (ValueError, OverflowError):
        value = 0
    if value <= 0:
        raise UsageError(f"{flag} must be a size such as 8GB or 500MB, not {text or 'empty'}.")
    return value


def use_threads(value: str, steer: bool = False) -> None:
    """Compute in as many threads as --threads says; with `steer`, `auto` follows the machine's load."""
    number = parse_auto("--threads", value)
    from quasar_core.api import decoding

    decoding.use_threads(number, steer)


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
        help="A folder, hub id, bare name, demo, or a pair's name; default: the current pair.",
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
Compress = Annotated[
    bool | None,
    typer.Option(
        "--compress/--no-compress",
        help="On a CPU, keep bfloat16 weights in 12 bits, without loss; default: where it is faster. Streamed blocks "
        "come from a copy, which is written once.",
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
        help="Which of the target's blocks are streamed at each pass, from its files or, to a GPU, from main memory: "
        "what does not fit, none, or all.",
        rich_help_panel=_MODEL,
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        help="The most main memory to take, such as 6GB; target blocks beyond it are streamed; default: what is free.",
        rich_help_panel=_MODEL,
    ),
]
MaxDeviceMemory = Annotated[
    str | None,
    typer.Option(
        "--max-device-memory",
        metavar="SIZE",
        help="The most to take of a GPU's memory, such as 10GB; target blocks beyond it are streamed; default: what is "
        "free.",
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
        "gated tokens that the verifier is sure of are not confirmed; at a --fidelity above 0.95 that saves hardly "
        "any time.",
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
        help="Who guesses the next tokens, or recycle, assistant, layer-skip, mtp; packages may add names.",
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
Seed = Annotated[
    int, typer.Option("--seed", help="Fixes every random choice; within 62 bits.", rich_help_panel=_SAMPLING)
]
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
