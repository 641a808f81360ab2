"""`quasar bench show`, `compare`, `plot`, `report` and `simulate`: look at what was measured."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quasar_cli import console
from quasar_cli.option_groups import takes_groups
from quasar_cli.options import Json, Verbose
from quasar_core.errors import UsageError

if TYPE_CHECKING:
    from quasar_core.bench.results import Results

ResultFile = Annotated[Path, typer.Argument(metavar="RESULTS", help="A result file of quasar bench.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")]


@dataclass(frozen=True)
class Forms:
    """How tables are printed, and how much."""

    markdown: Markdown = False
    latex: Annotated[bool, typer.Option("--latex", help="Print the tables as LaTeX, with booktabs.")] = False
    csv: Annotated[bool, typer.Option("--csv", help="Print one CSV table, numbers at full precision.")] = False
    details: Annotated[bool, typer.Option("--details", help="Tables of drafts and confirms too.")] = False
    paper: Annotated[bool, typer.Option("--paper", help="The paper's own figures below the first table.")] = False
    show_uncertain: Annotated[
        bool, typer.Option("--show-uncertain", help="Print speedups with a wide interval too.")
    ] = False


def show_tables(
    results: ResultFile,
    form: Forms,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Compute every figure again from the file's rows, by another way.")
    ] = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Print the tables of a result file again."""
    from quasar_core.bench.results import read_results

    found = read_results(results)
    present(found, results, form, as_json)
    if recompute:
        _recompute(found, results)


def _recompute(results: "Results", path: Path) -> None:
    """Say whether the file's rows give every figure again; exit code 1 where they do not."""
    from quasar_core.bench.metrics.recompute import differences

    count, wrong = differences(path, results)
    if wrong:
        for line in wrong:
            console.note_plain(f"- {line}")
        console.print_error(f"{len(wrong)} of {count} figures are not what the rows give.")
        raise typer.Exit(1)
    console.note_plain(f"All {count} figures were computed again from the rows, and are the same.")


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Result files over the same questions.")],
    markdown: Markdown = False,
    max_regression: Annotated[
        str | None,
        typer.Option(
            "--max-regression", metavar="P%", help="Exit code 1 where a speed fell by more, and not by chance."
        ),
    ] = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Print what changed between result files: speed, speedup and acceptance, by dataset and arm.

    Each file after the first is set beside the first. A * marks a speed whose interval leaves 1 out.
    """
    from quasar_cli.render import bench as render
    from quasar_cli.render.bench_words import MARKED
    from quasar_core.bench.metrics.compare import compare_all
    from quasar_core.bench.results import read_results

    share = _parse_percent(max_regression)
    if len(runs) < 2:
        raise UsageError("Give at least two result files.")
    comparisons = compare_all([read_results(path) for path in runs])
    if as_json:
        documents = [{"file": str(path), **_as_document(one)} for path, one in zip(runs[1:], comparisons, strict=True)]
        console.print_json(documents[0] | {"others": documents[1:]} if len(documents) > 1 else documents[0])
    else:
        for path, comparison in zip(runs[1:], comparisons, strict=True):
            _show_grids(render.comparison_grids(comparison, path.name), Forms(markdown=markdown))
        console.note_plain(MARKED)
    if share is not None:
        _refuse_regressions([change for one in comparisons for change in one.regressions(share)], share)


def _refuse_regressions(changes: list[Any], share: float) -> None:
    """Exit code 1, and which, where there are any."""
    for change in changes:
        console.note_plain(
            f"- {change.dataset}, {change.arm}: {change.quantity} fell from {change.before:.2f} to {change.after:.2f}"
        )
    if changes:
        console.print_error(f"{len(changes)} figures fell by more than {100 * share:g} %.")
        raise typer.Exit(1)


def _parse_percent(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        share = float(text.strip().removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise UsageError(f"--max-regression must be a percentage such as 5%, not {text}.")
    return share


def _as_document(comparison: Any) -> dict[str, Any]:
    changes = [{**asdict(change), "ratio": change.ratio, "shown": change.is_shown} for change in comparison.changes]
    settings = [dict(zip(("setting", "before", "after"), one, strict=True)) for one in comparison.settings]
    return {"changes": changes, "settings": settings}


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


def report(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE", help="A result file of quasar bench, and traces of generate; or traces."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Write one page that shows a run: the claim, tables, charts, and texts coloured by who made each token.

    It needs no network and no other file.
    """
    from quasar_core.bench.report.page import read_sources, write_page

    write_page(read_sources(files), output)
    if as_json:
        console.print_json({"page": str(output)})
    else:
        console.note_plain(f"The page is in {output}.")


def simulate(results: ResultFile, markdown: Markdown = False, verbose: Verbose = False, as_json: Json = False) -> None:
    """Replay what exact recorded under other windows, drafts and decisions: the speed that each would have."""
    from quasar_cli.render import bench as render
    from quasar_core.bench.results import read_results
    from quasar_core.bench.simulation.simulate import simulate as replay

    predictions = replay(read_results(results))
    if as_json:
        console.print_json({"predictions": [asdict(prediction) for prediction in predictions]})
        return
    _show_grids([render.simulation_grid(predictions)], Forms(markdown=markdown))


COMMANDS: list[tuple[str, Callable[..., None], str]] = [
    ("show", takes_groups(show_tables), "quasar bench show results.json --markdown"),
    ("compare", compare, "quasar bench compare a.json b.json --max-regression 5%"),
    ("plot", plot, "quasar bench plot results.json -o results.svg"),
    ("report", report, "quasar bench report results.json -o report.html"),
    ("simulate", simulate, "quasar bench simulate results.json"),
]


def present(results: "Results", path: Path, form: Forms, as_json: bool) -> None:
    """The result file's tables on stdout in the form asked for; divergences and failures on stderr in every form."""
    from quasar_cli.render import bench as render
    from quasar_cli.render import bench_words as words
    from quasar_core.bench.metrics.document import as_document

    if as_json:
        console.print_json({"results": str(path), **as_document(results)})
    elif form.csv:
        console.stream_text(render.as_csv(results))
    else:
        shown = render.Shown(form.show_uncertain, form.details, form.paper)
        _show_grids(render.result_grids(results, shown), form)
        console.note_plain(
            f"{words.legend(results, form.show_uncertain)}\n{words.describe_run(results)}.\nThe result file is {path}."
        )
    for sentence in words.sentences(results):
        console.note_plain(sentence)


def _show_grids(grids: list[Any], form: Forms) -> None:
    from quasar_cli.render import grids as render

    if form.markdown or form.latex:
        as_text = render.as_latex if form.latex else render.as_markdown
        console.stream_text("\n".join(as_text(grid) for grid in grids))
    else:
        console.show(*map(render.as_table, grids))
