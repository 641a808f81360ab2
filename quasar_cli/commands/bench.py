"""`quasar bench`: measure the arms side by side, and look at what was measured."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from quasar_cli import console
from quasar_cli.commands import bench_results
from quasar_cli.commands.bench_results import Forms, present
from quasar_cli.commands.bench_steps import EXAMPLES, steps
from quasar_cli.commands.generate import end_loading
from quasar_cli.commands.models import announce
from quasar_cli.help import Command, Group, examples
from quasar_cli.option_groups import ModelOptions, takes_groups
from quasar_cli.options import DraftFrom, Fidelity, Json, Processors, Seed, Verbose, Window, parse_auto, use_threads
from quasar_core.bench.arms import ARMS, BASELINE, DEFAULT_ARMS, TWIN, TWIN_EVERY, BenchConfig, PeerOptions, parse_arms
from quasar_core.config import VerifyMode
from quasar_core.errors import UsageError
from quasar_core.records import Progress

if TYPE_CHECKING:
    from quasar_core.api.decoding import Encode, Pair

app = typer.Typer(
    cls=Group,
    help="Measure acceptance length and speedup; compare, plot and report what was measured.",
    invoke_without_command=True,
    epilog=examples(
        "quasar bench --dataset demo",
        "quasar bench --dataset mt-bench,gsm8k --limit 20",
        "quasar bench --dataset spec-bench --profile quick",
        "quasar bench show results.json --markdown",
        "quasar bench report results.json -o report.html",
    ),
)

# What --profile stands for; an option that is given counts more.
PROFILES: dict[str, dict[str, Any]] = {
    "quick": {"max_new_tokens": 64, "repeats": 1, "temperature": "0"},
    "paper": {"max_new_tokens": 1024, "repeats": 3, "temperature": "0,1", "num_draft_tokens": "5"},
}
Profile = Literal["quick", "paper"]
_PEERS = "Other programs"


@dataclass(frozen=True)
class BenchOptions:
    """The options that make a BenchConfig."""

    arms: Annotated[str, typer.Option("--arms", help=f"Comma-separated: {', '.join(ARMS)}.")] = DEFAULT_ARMS
    profile: Annotated[
        Profile | None,
        typer.Option("--profile", help="quick: minutes; paper: its lengths, T = 0 and 1, three repeats."),
    ] = None
    limit: Annotated[
        int | None, typer.Option("--limit", help="Questions of a dataset, spread evenly over it; default: all.")
    ] = None
    repeats: Annotated[
        int | None, typer.Option("--repeats", help="How often each question is asked; default: once.")
    ] = None
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", help="The most tokens to generate; default: 256.")
    ] = None
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end of text, up to --max-new-tokens.")
    ] = False
    num_draft_tokens: Annotated[
        str | None,
        typer.Option("--num-draft-tokens", metavar="N|auto", help="Tokens of a draft.", rich_help_panel="Speculation"),
    ] = None
    draft_from: DraftFrom = None
    window: Window = "auto"
    fidelity: Fidelity = 0.999
    temperature: Annotated[
        str | None,
        typer.Option(
            "--temperature",
            "-t",
            metavar="T[,T]",
            help="0 takes the best token; above 0 draws. Several: one run for each.",
            rich_help_panel="Sampling",
        ),
    ] = None
    processors: Processors = True
    seed: Seed = 0
    check_noise: Annotated[
        bool,
        typer.Option(
            "--check-noise/--no-check-noise",
            help="Ask vanilla every fourth question again, to see how alike two identical arms come out.",
        ),
    ] = True
    run_code: Annotated[
        bool,
        typer.Option("--run-code", help="Run the programs that models write, to score HumanEval. No sandbox."),
    ] = False
    gguf: Annotated[
        str | None,
        typer.Option("--gguf", metavar="FILE", help="The model for llama.cpp.", rich_help_panel=_PEERS),
    ] = None
    llama_server: Annotated[
        str | None,
        typer.Option(
            "--llama-server", metavar="FILE", help="llama.cpp's server; default: on PATH.", rich_help_panel=_PEERS
        ),
    ] = None
    spec_type: Annotated[
        str,
        typer.Option("--spec-type", help="How llama.cpp-spec drafts, as llama-server says.", rich_help_panel=_PEERS),
    ] = "ngram-simple"
    vllm_python: Annotated[
        str | None,
        typer.Option("--vllm-python", metavar="FILE", help="The Python that has vLLM.", rich_help_panel=_PEERS),
    ] = None

    def config(self, assistant: str | None = None) -> BenchConfig:
        """The checked config, with the small model that peers are given; UsageError for a value that cannot be."""
        return BenchConfig(
            arms=self._arms(),
            temperatures=_parse_temperatures(str(self._chosen("temperature", "0"))),
            seed=self.seed,
            limit=self.limit,
            repeats=self._chosen("repeats", 1),
            max_new_tokens=self._chosen("max_new_tokens", 256),
            num_draft_tokens=parse_auto("--num-draft-tokens", self._chosen("num_draft_tokens", "auto")),
            draft_from=tuple(self.draft_from or ()),
            window=parse_auto("--window", self.window),
            ignore_eos=self.ignore_eos,
            processors=self.processors,
            fidelity=self.fidelity,
            run_code=self.run_code,
            peers=PeerOptions(assistant, self.gguf, self.llama_server, self.spec_type, self.vllm_python),
        )

    def _chosen(self, name: str, usual: Any) -> Any:
        """What was given, else what the profile says, else what is usual."""
        given = getattr(self, name)
        return PROFILES.get(self.profile or "", {}).get(name, usual) if given is None else given

    def _arms(self) -> tuple[str, ...]:
        names = [arm.name for arm in parse_arms(self.arms)]
        twin = [TWIN] if self.check_noise and BASELINE in names and TWIN not in names else []
        return (*names, *twin)


def _parse_temperatures(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--temperature must be numbers separated by commas, not {text}.") from None


@app.callback()
@takes_groups
def bench(
    context: typer.Context,
    models: ModelOptions,
    options: BenchOptions,
    form: Forms,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            help="Comma-separated: demo, mt-bench, gsm8k, humaneval, alpaca, cnn-dm, spec-bench, speed-bench, or JSONL "
            "files.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The result file; an earlier one is replaced.")] = Path(
        "results.json"
    ),
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with an interrupted run, or start anew.")
    ] = True,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Run every arm on every question and print a table like the paper's.

    Everything that a table needs is in the result file: `quasar bench show`, `report`, `compare` and `plot` read
    it.
    """
    if context.invoked_subcommand is not None:
        return
    if dataset is None:
        raise UsageError("--dataset is missing: name one, such as --dataset demo.")
    config = options.config(models.assistant)

    from quasar_core.bench.datasets import load_datasets
    from quasar_core.bench.results import refuse_foreign_results

    refuse_foreign_results(output)
    datasets = load_datasets(dataset, config.limit)
    config = _without_idle_twin(config, [len(one.questions) for one in datasets])
    announce(models.model)
    use_threads(models.threads, steer=True)
    with console.progress_bar() as progress:
        from quasar_core.api import decoding, measuring

        pair = _load_pair(models, config, partial(measuring.encode_shortest, datasets), progress)

        try:
            results = measuring.run_bench(pair, datasets, config, output, resume=resume, progress=progress)
        except KeyboardInterrupt:
            console.note_plain("Interrupted; the same command goes on where this run stopped.")
            raise
    if verbose:
        for line in [*results.run.notes, decoding.describe_threads()]:
            console.note_plain(f"- {line}")
    present(results, output, form, as_json)
    if results.errors:
        raise typer.Exit(1)  # how many, and why, is said with the tables


def _without_idle_twin(config: BenchConfig, questions: list[int]) -> BenchConfig:
    """Leave out the second run of vanilla where there are too few questions for it to tell anything."""
    from quasar_core.bench.metrics.estimates import FEWEST

    if sum(-(-count // TWIN_EVERY) for count in questions) >= FEWEST:
        return config
    return replace(config, arms=tuple(name for name in config.arms if name != TWIN))


def _load_pair(models: ModelOptions, config: BenchConfig, encode: "Encode", progress: Progress) -> "Pair":
    """Load what the arms need: without one that runs the verifier, the target alone.

    Where the question that `encode` takes for the shortest is too long for the model, the run is refused first.
    """
    from quasar_core.api import decoding

    verify: VerifyMode = "exact" if models.use_target else "quantized"
    if not any(ARMS[name].needs_verifier for name in config.arms):
        verify = "full"
    asks = any(ARMS[name].draft == "assistant" for name in config.arms)
    if asks and models.assistant is None:
        raise UsageError("The arm assistant needs --assistant MODEL, a small model of the same vocabulary.")
    wanted = models.to_load(verify)
    pair = decoding.load(wanted if asks else replace(wanted, assistant=None), progress, encode)
    end_loading(pair, models)
    return pair


for name, command, example in bench_results.COMMANDS:
    app.command(name, cls=Command, epilog=examples(example))(command)
app.command("steps", cls=Command, epilog=EXAMPLES)(steps)
