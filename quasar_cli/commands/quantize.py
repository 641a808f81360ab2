"""`quasar quantize`: write a model's low-bit copy, once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from glob import escape
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quasar_cli import console
from quasar_cli.commands.choose_bits import Chooser, Streaming
from quasar_cli.commands.models import announce, push_verifier
from quasar_cli.help import examples
from quasar_cli.option_groups import takes_groups, with_adapter
from quasar_cli.options import Adapter, Device, Folder, Json, Threads, TrustRemoteCode, Verbose, parse_size, use_threads
from quasar_core.config import BITS, QUICK, SAMPLES, Backend, Method, Offload, QuantizeConfig, Rounding
from quasar_core.errors import QuasarError, UsageError
from quasar_core.store import check_can_push

if TYPE_CHECKING:
    from quasar_core.records import QuantizeReport

_CALIBRATION = "Calibration"
EXAMPLES = examples(
    "quasar quantize Qwen/Qwen3-0.6B --dry-run",
    "quasar quantize Qwen/Qwen3-0.6B",
    "quasar quantize demo --quick",
    "quasar quantize MODEL --bits 4.25 --calibration c4",
    "quasar quantize MODEL --bits auto",
)


@dataclass(frozen=True)
class QuantizeOptions:
    """The options that make a QuantizeConfig."""

    bits: Annotated[
        str | None,
        typer.Option(
            "--bits",
            "-b",
            metavar="NUMBER|auto",
            help="Bits of a weight: 2, 3, 4 or 8, or a fraction: then widths by layer; auto: whatever makes decoding "
            "fastest on this device, groups and head included; default: 4.",
            show_default=False,
        ),
    ] = None
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Choose widths by layer, in the bytes that --bits everywhere would take.")
    ] = False
    target_agreement: Annotated[
        float | None,
        typer.Option("--target-agreement", help="Find the smallest checkpoint that reaches it, such as 0.97."),
    ] = None
    widths: Annotated[
        str | None,
        typer.Option(
            "--widths",
            help="Bits that layers may have, where each has its own, such as 4,8, which vLLM takes; default: 2,3,4,8.",
            show_default=False,
        ),
    ] = None
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            help="Weights that share a scale: 32, 64, 128, or -1 for a whole row; default: the largest of 128, "
            "64 and 32 that divides the inputs of every layer.",
            show_default=False,
        ),
    ] = None
    sym: Annotated[bool, typer.Option("--sym/--no-sym", help="Codes symmetric around zero, or with a zero point.")] = (
        True
    )
    act_order: Annotated[
        bool, typer.Option("--act-order/--no-act-order", help="Quantize the most active inputs first.")
    ] = True
    method: Annotated[
        Method, typer.Option("--method", help="gptq, or 8 bits for weights and activations: w8a8 (integers) or fp8.")
    ] = "gptq"
    rounding: Annotated[
        Rounding,
        typer.Option(
            "--rounding",
            help="gptq, or nearest: every weight on its own; of method gptq that needs no text and takes minutes.",
        ),
    ] = "gptq"
    lm_head_bits: Annotated[
        int | None,
        typer.Option("--lm-head-bits", help="Bits of the output head; 16, the default, leaves it.", show_default=False),
    ] = None
    calibration: Annotated[
        str,
        typer.Option(
            "--calibration",
            help="self (the model's own text), a text or JSONL file; generic, which is at hand; wikitext2 or c4.",
            rich_help_panel=_CALIBRATION,
        ),
    ] = "self"
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="A verifier to try with, sooner: 16 texts of 128 tokens, and fidelity on 8 rows of text, not 32.",
            rich_help_panel=_CALIBRATION,
        ),
    ] = False
    samples: Annotated[
        int | None,
        typer.Option("--samples", help=f"Calibration texts; default: {SAMPLES}.", rich_help_panel=_CALIBRATION),
    ] = None
    seq_len: Annotated[
        int | None,
        typer.Option(
            "--seq-len",
            help="Tokens of a text; default: 512 for self and generic, else 2048.",
            rich_help_panel=_CALIBRATION,
        ),
    ] = None
    damp: Annotated[float, typer.Option("--damp", help="Damping, as a share of the Hessian's mean diagonal.")] = 0.05
    seed: Annotated[int, typer.Option("--seed", help="Fixes the calibration text.", rich_help_panel=_CALIBRATION)] = 0
    backend: Annotated[
        Backend, typer.Option("--backend", help="Whose solver: our own, or optimum's (needs the extra gptqmodel).")
    ] = "native"

    def config(self) -> QuantizeConfig:
        """The checked config; UsageError for a value that cannot be."""
        return QuantizeConfig.of(
            bits=None if self.bits is None or self.automatic else parse_bits(self.bits),
            mixed=self.mixed,
            target_agreement=self.target_agreement,
            group_size=self.group_size,
            sym=self.sym,
            act_order=self.act_order,
            method=self.method,
            rounding=self.rounding,
            lm_head_bits=16 if self.lm_head_bits is None else self.lm_head_bits,
            calibration=self.calibration,
            **self._texts(),
            damp=self.damp,
            seed=self.seed,
            backend=self.backend,
            widths=BITS if self.widths is None else parse_widths(self.widths),
        )

    @property
    def automatic(self) -> bool:
        """Whether the codes are chosen by what makes decoding fastest."""
        return self.bits == "auto"

    def _texts(self) -> dict[str, int]:
        """How much text is read: what is asked for by itself goes before --quick."""
        asked = {"samples": self.samples, "seq_len": self.seq_len}
        return (QUICK if self.quick else {}) | {name: value for name, value in asked.items() if value is not None}


def parse_bits(text: str) -> float:
    """A number; UsageError for anything else."""
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(f"--bits must be auto or a number such as 4 or 4.25, not {text}.") from error


def parse_widths(text: str) -> tuple[int, ...]:
    """Whole numbers between commas, in order, each once."""
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise UsageError(f"--widths must be whole numbers such as 4,8, not {text}.") from error


@takes_groups
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, hub id, bare name, or demo.")],
    options: QuantizeOptions,
    adapter: Adapter = None,
    output: Folder = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on after the last finished layer.")] = True,
    device: Device = "auto",
    threads: Threads = "auto",
    trust_remote_code: TrustRemoteCode = False,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="REPO", help="Upload the verifier to this hub id when done.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push-to-hub: if the repository is new, show it to nobody else.")
    ] = False,
    max_memory: Annotated[
        str | None,
        typer.Option(
            "--max-memory",
            metavar="SIZE",
            help="Hidden states beyond this, such as 8GB, go to a file; default: half of the free memory.",
        ),
    ] = None,
    offload: Annotated[
        Offload,
        typer.Option("--offload", help="With --bits auto: as decoding will have it; see `quasar generate --help`."),
    ] = "auto",
    decode_memory: Annotated[
        str | None,
        typer.Option(
            "--decode-memory",
            metavar="SIZE",
            help="With --bits auto: the --max-memory that decoding will have, such as 6GB; default: what is free.",
        ),
    ] = None,
    successors: Annotated[
        bool,
        typer.Option(
            "--successors",
            help="Only count what drafts begin with, for a verifier that was made before; all others have it.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take and what is free here; write nothing.")
    ] = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Quantize a model once: the verifier checkpoint is written beside it, and the pair becomes the current one."""
    config = options.config()
    streaming = Streaming(offload, parse_size("--decode-memory", decode_memory))
    if not options.automatic:
        streaming.refuse()
    if successors and dry_run:
        raise UsageError("--successors has no plan to show: leave --dry-run out.")
    use_threads(threads)
    announce(model)
    if adapter is not None and not dry_run:  # the plan is that of the model
        model = with_adapter(model, adapter) or model
    if push_to_hub is not None:
        check_can_push(push_to_hub)
    asked = Asked(model, config, output, device, parse_size("--max-memory", max_memory), trust_remote_code)
    _say_of_spare_gpus(device)
    if successors:
        _add_successors(asked, as_json)
        return
    chooser = _chooser(asked, options, streaming, as_json) if options.automatic else None
    if dry_run:
        _show_plan(asked, chooser, as_json)
        return
    if chooser:
        with _saying_how_to_go_on(resume):
            asked = replace(asked, config=chooser.choose(force, resume, asked.max_memory))
        resume = True  # of the verifier that was chosen nothing is made yet but its text
    report = _make(asked, force, resume)
    _say_what_was_kept(Path(report.checkpoint))
    pushed = {} if push_to_hub is None else {"url": _push(Path(report.checkpoint), push_to_hub, private)}
    if as_json:
        console.print_json({**asdict(report), **(chooser.chosen if chooser else {}), **pushed})
    else:
        _show_report(report, verbose)


@dataclass(frozen=True)
class Asked:
    """What is to be quantized, how, where to and on what."""

    model: str
    config: QuantizeConfig
    output: Path | None
    device: str
    max_memory: int | None  # bytes
    trust_remote_code: bool

    def named(self) -> dict[str, Any]:
        """What the functions of `api` take by name, beside the model and the config."""
        names = ("output", "device", "trust_remote_code")
        return {name: getattr(self, name) for name in names} | {"tell": console.note_plain}


def _chooser(asked: Asked, options: QuantizeOptions, streaming: Streaming, as_json: bool) -> Chooser:
    """`--bits auto`: groups and head that were asked for stay; UsageError for options that do not go with it."""
    from quasar_core.choose_bits import Wanted

    groups, heads = (() if value is None else (value,) for value in (options.group_size, options.lm_head_bits))
    place = asked.output, asked.device, asked.trust_remote_code
    wanted = Wanted(asked.model, asked.config, groups, heads, *place, streaming.offload, streaming.memory)
    return Chooser(wanted, as_json)


def _make(asked: Asked, force: bool, resume: bool) -> "QuantizeReport":
    """Write the verifier, with a bar."""
    from quasar_core.api import quantizing

    with _saying_how_to_go_on(resume), console.progress_bar() as progress:
        return quantizing.quantize(
            asked.model,
            asked.config,
            force=force,
            resume=resume,
            max_memory=asked.max_memory,
            progress=progress,
            **asked.named(),
        )


def _show_report(report: "QuantizeReport", verbose: bool) -> None:
    """The tables, and what comes next."""
    from quasar_cli.render.quantize import report_tables

    console.show(*report_tables(report, verbose))
    if verbose:
        _say_how_it_computed()
    console.note_plain("Next: quasar generate 'Why is the sky blue?'")


def _add_successors(asked: Asked, as_json: bool) -> None:
    """`--successors`: the file's place, and its size."""
    from quasar_core.api import quantizing

    with console.progress_bar() as progress:
        file = quantizing.add_successors(asked.model, asked.config, progress=progress, **asked.named())
    if as_json:
        console.print_json({"successors": str(file), "bytes": file.stat().st_size})
    else:
        console.note_plain(f"{file} holds what drafts begin with ({file.stat().st_size:,} bytes).")


def _say_of_spare_gpus(device: str) -> None:
    """On stderr, where there are several."""
    from quasar_core.api import quantizing

    if sentence := quantizing.spare_gpus(device):
        console.note_plain(sentence)


def _say_how_it_computed() -> None:
    """On stderr: the solver's loops on the processor, and the threads."""
    from quasar_core.api import decoding, quantizing

    loops, threads = quantizing.describe_loops(), decoding.describe_threads()
    console.note_plain(f"- loops of the solver on the CPU: {loops}\n- {threads}")


@contextmanager
def _saying_how_to_go_on(resume: bool) -> Iterator[None]:
    """After Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if interrupt.args:  # it is finished already, and says where
            console.note_plain(f"Interrupted. {interrupt}")
            raise
        command = "the same command" if resume else "the same command without --no-resume"
        console.note_plain(f"Interrupted. What is finished is kept: {command} goes on from there.")
        raise


def _say_what_was_kept(output: Path) -> None:
    """Where a replaced folder held more than quasar wrote into it."""
    from quasar_core.api import quantizing

    for place in sorted(output.parent.glob(f"{escape(quantizing.replaced_folder(output).name)}*")):
        console.note_plain(f"{place} holds what quasar did not write in the folder that was replaced.")


def _show_plan(asked: Asked, chooser: Chooser | None, as_json: bool) -> None:
    """`--dry-run`: the plan, and a refusal after it where it cannot be carried out."""
    if chooser:
        chooser.show_candidates(asked.max_memory)
        return
    from quasar_core.api import quantizing

    plan = quantizing.estimate(asked.model, asked.config, max_memory=asked.max_memory, **asked.named())
    if as_json:
        console.print_json(plan.to_dict())
    else:
        from quasar_cli.render.quantize import plan_table

        console.show(plan_table(plan))
    quantizing.refuse_what_cannot_fit(plan, asked.output)


def _push(folder: Path, repository: str, private: bool) -> str:
    """Upload; where that fails, say that nothing of the work is lost."""
    try:
        return push_verifier(folder, repository, private)
    except QuasarError as error:
        again = f"quasar models push {quote(folder.name)} {repository}"
        raise QuasarError(f"{error} The verifier is finished in {folder}; try again with `{again}`.") from error
