"""`quasar bench`: measure the arms side by side, and look at what was measured."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quasar_cli import console
from quasar_cli.commands.bench_steps import EXAMPLES, steps
from quasar_cli.commands.generate import say_digest
from quasar_cli.commands.models import announce
from quasar_cli.help import Command, Group, examples
from quasar_cli.options import (
    DraftFrom,
    Json,
    MaxNewTokens,
    ModelOptions,
    NumDraftTokens,
    Processors,
    Seed,
    Temperature,
    Verbose,
    Window,
    parse_auto,
    takes_groups,
    use_threads,
)
from quasar_core.bench.arms import ARMS, DEFAULT_ARMS, BenchConfig, parse_arms
from quasar_core.config import VerifyMode
from quasar_core.errors import UsageError
from quasar_core.records import Progress

if TYPE_CHECKING:
    from quasar_core.api import Pair
    from quasar_core.bench.results import Results

app = typer.Typer(
    cls=Group,
    help="Measure acceptance length and speedup; compare and plot what was measured.",
    invoke_without_command=True,
    epilog=examples(
        "quasar bench --dataset demo",
        "quasar bench --dataset mt-bench,gsm8k --limit 20",
        "quasar bench show results.json --markdown",
        "quasar bench --help",
    ),
)

ResultFile = Annotated[Path, typer.Argument(metavar="RESULTS", help="A result file of quasar bench.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")]
Csv = Annotated[bool, typer.Option("--csv", help="Print one CSV table, numbers at full precision.")]


@dataclass(frozen=True)
class BenchOptions:
    """The options that make a BenchConfig."""

    arms: Annotated[str, typer.Option("--arms", help=f"Comma-separated: {', '.join(ARMS)}.")] = DEFAULT_ARMS
    limit: Annotated[
        int | None, typer.Option("--limit", help="Questions of a dataset, spread evenly over it; default: all.")
    ] = None
    repeats: Annotated[int, typer.Option("--repeats", help="How often each question is asked.")] = 1
    max_new_tokens: MaxNewTokens = 256
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end of text, up to --max-new-tokens.")
    ] = False
    num_draft_tokens: NumDraftTokens = "auto"
    draft_from: DraftFrom = None
    window: Window = "auto"
    temperature: Temperature = 0.0
    processors: Processors = True
    seed: Seed = 0

    def config(self) -> BenchConfig:
        """The checked config; UsageError for a value that cannot be."""
        return BenchConfig(
            arms=tuple(arm.name for arm in parse_arms(self.arms)),
            temperature=self.temperature,
            seed=self.seed,
            limit=self.limit,
            repeats=self.repeats,
            max_new_tokens=self.max_new_tokens,
            num_draft_tokens=parse_auto("--num-draft-tokens", self.num_draft_tokens),
            draft_from=tuple(self.draft_from or ()),
            window=parse_auto("--window", self.window),
            ignore_eos=self.ignore_eos,
            processors=self.processors,
        )


@app.callback()
@takes_groups
def bench(
    context: typer.Context,
    models: ModelOptions,
    options: BenchOptions,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            help="Comma-separated: demo, mt-bench, gsm8k, humaneval, alpaca, cnn-dm, spec-bench, or JSONL files.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The result file; an earlier one is replaced.")] = Path(
        "results.json"
    ),
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with an interrupted run, or start anew.")
    ] = True,
    markdown: Markdown = False,
    as_csv: Csv = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Run every arm on every question and print a table like the paper's.

    Everything that a table needs is in the result file: `quasar bench show`, `compare` and `plot` read it.
    """
    if context.invoked_subcommand is not None:
        return
    if dataset is None:
        raise UsageError("--dataset is missing: name one, such as --dataset demo.")
    config = options.config()

    from quasar_core.bench.datasets import load_datasets
    from quasar_core.bench.results import refuse_foreign_results

    refuse_foreign_results(output)
    datasets = load_datasets(dataset, config.limit)
    announce(models.model)
    use_threads(models.threads, steer=True)
    with console.progress_bar() as progress:
        pair = _load_pair(models, config, progress)
        from quasar_core import api

        try:
            results = api.run_bench(pair, datasets, config, output, resume=resume, progress=progress)
        except KeyboardInterrupt:
            console.note_plain("Interrupted; the same command goes on where this run stopped.")
            raise
    if verbose:
        for line in [*results.run.notes, api.describe_threads()]:
            console.note_plain(f"- {line}")
    _present(results, output, markdown, as_csv, as_json)


def _load_pair(models: ModelOptions, config: BenchConfig, progress: Progress) -> "Pair":
    """Load what the arms need: without one that runs the verifier, the target alone."""
    from quasar_core import api

    verify: VerifyMode = "exact" if models.use_target else "quantized"
    if not any(ARMS[name].needs_verifier for name in config.arms):
        verify = "full"
    pair = api.load(models.to_load(verify), progress)
    if models.check_digest:
        say_digest(pair)
    return pair


@app.command("show", cls=Command, epilog=examples("quasar bench show results.json --markdown"))
def show(
    results: ResultFile,
    markdown: Markdown = False,
    as_csv: Csv = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Print the tables of a result file again."""
    from quasar_core.bench.results import read_results

    _present(read_results(results), results, markdown, as_csv, as_json)


@app.command("compare", cls=Command, epilog=examples("quasar bench compare before.json after.json"))
def compare(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="A result file of quasar bench.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="Another one, over the same questions.")],
    markdown: Markdown = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Print what changed between two result files: speed, speedup and acceptance, by dataset and arm."""
    from quasar_cli.render import bench as render
    from quasar_core.bench.metrics import compare as compare_results
    from quasar_core.bench.results import read_results

    comparison = compare_results(read_results(before), read_results(after))
    if as_json:
        changes = [{**asdict(change), "ratio": change.ratio} for change in comparison.changes]
        settings = [dict(zip(("setting", "before", "after"), one, strict=True)) for one in comparison.settings]
        console.print_json({"changes": changes, "settings": settings})
        return
    _show_grids(render.comparison_grids(comparison), markdown)


@app.command("plot", cls=Command, epilog=examples("quasar bench plot results.json -o results.svg"))
def plot(
    results: ResultFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="A PNG or SVG file.")] = Path("results.png"),
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Draw speedups with their intervals, and how many draft tokens a step accepted."""
    from quasar_core.bench.plots import plot as draw
    from quasar_core.bench.results import read_results

    draw(read_results(results), output)
    if as_json:
        console.print_json({"figure": str(output)})
    else:
        console.note_plain(f"The figure is in {output}.")


app.command("steps", cls=Command, epilog=EXAMPLES)(steps)


def _present(results: "Results", path: Path, markdown: bool, as_csv: bool, as_json: bool) -> None:
    """The result file's tables on stdout in the form asked for; divergences and failures on stderr in every form."""
    from quasar_cli.render import bench as render

    if as_json:
        console.print_json(_as_document(results, path))
    elif as_csv:
        console.stream_text(render.as_csv(results))
    else:
        _show_grids(render.result_grids(results), markdown)
        console.note_plain(f"{render.legend(results)}\n{render.describe_run(results)}.\nThe result file is {path}.")
    said = render.describe_conditions(results), render.describe_divergences(results), render.describe_errors(results)
    for sentence in said:
        if sentence:
            console.note_plain(sentence)


def _show_grids(grids: list[Any], markdown: bool) -> None:
    from quasar_cli.render import bench as render

    if markdown:
        console.stream_text("\n".join(render.as_markdown(grid) for grid in grids))
    else:
        console.show(*map(render.as_table, grids))


def _as_document(results: "Results", path: Path) -> dict[str, Any]:
    """The JSON form: the run, the metrics by dataset and by category, the means, the failures."""
    from quasar_cli.render.bench import as_record
    from quasar_core.bench.metrics import conditions, mean_over_datasets, measure

    metrics = measure(results)
    return {
        "results": str(path),
        "run": results.run.to_dict(),
        "metrics": [as_record(metric) for metric in metrics],
        "categories": [as_record(metric) for metric in measure(results, by_category=True)],
        "conditions": {**asdict(conditions(results)), "was_busy": conditions(results).was_busy},
        "means": [asdict(mean) for mean in mean_over_datasets(metrics)],
        "divergences": [{**asdict(one), "near_tie": one.near_tie} for one in results.divergences],
        "errors": [
            {"dataset": row.dataset, "question_id": row.question_id, "arm": row.arm, "error": row.error}
            for row in results.errors
        ],
    }
