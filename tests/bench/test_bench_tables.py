"""What a bench shows: result files read again, compared, plotted, drawn as tables; the commands around them."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.bench_pair import CountingModel, make_pair
from helpers.bench_records import make_results, make_row, make_run, make_stats

from quasar_cli import console
from quasar_cli.main import run
from quasar_cli.render import bench as render
from quasar_cli.render import bench_words as words
from quasar_cli.render import grids
from quasar_core.bench.arms import BenchConfig
from quasar_core.bench.metrics.arm_metrics import measure
from quasar_core.bench.metrics.compare import compare
from quasar_core.bench.metrics.document import as_record
from quasar_core.bench.plots import accepted_per_step, draw_accepted, draw_speedups, plot
from quasar_core.bench.results import Results, read_results, write_results
from quasar_core.config import LoadOptions
from quasar_core.errors import QuasarError, UsageError
from quasar_core.records import Progress, Step

pytest_plugins = ["helpers.cli_fixtures"]
pytestmark = pytest.mark.usefixtures("own_home")


def slower(results: Results, factor: float) -> Results:
    """The same run, with the drafting arm's decoding taking `factor` times as long."""
    rows = [
        replace(row, stats=replace(row.stats, decode_s=row.stats.decode_s * factor))
        if row.arm == "ngram" and row.stats
        else row
        for row in results.rows
    ]
    return Results(replace(results.run, dtype="bfloat16"), rows)


# Result files


def test_a_result_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_results(make_results(), tmp_path / "r.json")
    assert read_results(tmp_path / "r.json") == make_results()
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_an_older_file_shows_its_arms_by_their_names_of_today(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    rows = [replace(row, arm="quantized") if row.arm == "ngram" else row for row in make_results().rows]
    results = Results(make_run(config=BenchConfig(("vanilla", "quantized"))), rows)
    write_results(results, path)
    path.write_text(path.read_text().replace('"quantized"', '"quasar"'))
    assert read_results(path) == results
    assert {metric.arm for metric in measure(read_results(path))} == {"vanilla", "quantized"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("x", r"r\.json is not readable JSON"),
        ("{}", "rows must be a list, not null"),
        ('{"format_version": 3, "rows": []}', "not a result file of quasar bench: format version 3, where 2 is read"),
        ("[]", "does not hold a JSON object"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(UsageError, match=reason):
        read_results(tmp_path / "r.json")


def test_a_file_without_answers_is_refused(tmp_path: Path) -> None:
    """Nothing could be shown of it but empty tables."""
    write_results(replace(make_results(), rows=[]), tmp_path / "r.json")
    with pytest.raises(UsageError, match=r"r\.json is not a result file of quasar bench: it holds no answers"):
        read_results(tmp_path / "r.json")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"r\.json does not exist"):
        read_results(tmp_path / "r.json")


# Comparing


def test_changes_by_hand() -> None:
    comparison = compare(make_results(), slower(make_results(), 2))
    changes = {(change.arm, change.quantity): change for change in comparison.changes}
    assert set(changes) == {("vanilla", "tokens/s")} | {
        ("ngram", quantity) for quantity in ("tokens/s", "speedup", "acceptance length")
    }
    assert changes["vanilla", "tokens/s"].ratio == 1.0
    assert changes["ngram", "tokens/s"].ratio == pytest.approx(0.5)
    speedup = changes["ngram", "speedup"]
    assert (speedup.before, speedup.after) == (pytest.approx(2.8), pytest.approx(1.4))
    assert changes["ngram", "acceptance length"].ratio == 1.0
    assert comparison.settings == [("dtype", "float32", "bfloat16")]


def test_other_questions_are_refused() -> None:
    other = make_run(datasets={"e": {"questions": 3, "sha256": "1" * 64}})
    with pytest.raises(UsageError, match=r"not about the same questions: d \(2 questions.*and e \(3 questions"):
        compare(make_results(), Results(other, []))


def test_runs_without_a_common_arm_are_refused() -> None:
    results = make_results()
    only = make_run(config=BenchConfig(("exact",)))
    with pytest.raises(UsageError, match="no arm in common"):
        compare(results, Results(only, [make_row("exact", 1, [], None, error="x")]))


# Plotting


@pytest.mark.parametrize(("name", "begin"), [("f.png", b"\x89PNG"), ("f.SVG", b"<?xml")])
def test_a_figure_by_its_suffix(tmp_path: Path, name: str, begin: bytes) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "figures").mkdir()
    plot(make_results(), tmp_path / "figures" / name)
    assert (tmp_path / "figures" / name).read_bytes().startswith(begin)


def test_an_arm_without_numbers_does_not_stop_the_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row for row in make_results().rows if row.arm == "ngram"]
    plot(Results(make_run(config=BenchConfig(("ngram",))), rows), tmp_path / "f.svg")
    plot(Results(make_run(config=BenchConfig(("vanilla",))), []), tmp_path / "g.svg")
    assert (tmp_path / "g.svg").is_file()


def test_accepted_tokens_per_step() -> None:
    assert accepted_per_step(make_results(), "ngram") == {2: 1, 0: 2, 1: 1}
    assert accepted_per_step(make_results(), "vanilla") == {}


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.png or \.svg, not f\.pdf"):
        plot(make_results(), tmp_path / "f.pdf")


def test_every_temperature_has_bars_of_its_own_with_their_numbers() -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes, rows = figure.subplots(), make_results().rows
    rows += [replace(row, temperature=1.0) for row in rows]
    run = make_run(config=BenchConfig(("vanilla", "ngram", "vanilla-again"), temperatures=(0.0, 1.0)))
    draw_speedups(axes, Results(run, rows))
    assert [round(bar.get_x() + bar.get_width() / 2) for bar in axes.patches] == [0, 1]
    assert [text.get_text() for text in axes.texts] == ["wide", "wide"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["d, T = 0\n(n = 2)", "d, T = 1\n(n = 2)"]


@pytest.mark.parametrize(("questions", "number"), [(8, "0.32"), (7, "0.33?")])
def test_a_bar_has_its_number_with_its_doubt(questions: int, number: str) -> None:
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    draw_speedups(axes, of_questions(questions, 9.0))
    assert [text.get_text() for text in axes.texts] == [number]


def test_steps_that_accepted_many_tokens_share_a_bar() -> None:
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    steps = [Step(20, 0)] * 2 + [Step(90, 16), Step(90, 90)]
    rows = [make_row("ngram", 1, [1] * 111, make_stats(111, 1.0, steps))]
    draw_accepted(axes, Results(make_run(config=BenchConfig(("ngram",))), rows))
    assert [bar.get_height() for bar in axes.patches] == [50, *[0] * 15, 50]
    assert axes.get_xticklabels()[-1].get_text() == "16 or more"


def test_the_figure_says_in_how_many_answers_the_text_is_plain_decodings(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(make_results(), tmp_path / "f.svg")
    assert "<!-- ngram: same text in 1 of 2 -->" in (tmp_path / "f.svg").read_text()


def test_without_matplotlib_it_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(QuasarError, match=r"pip install 'quasar-cli\[plots\]'"):
        plot(make_results(), tmp_path / "f.png")


# Tables

UNCERTAIN = render.Shown(uncertain=True)


def test_the_papers_table() -> None:
    (grid,) = render.main_grids(measure(make_results()), UNCERTAIN)
    assert grid.rows == [["vanilla", "1.00×", "1.00"], ["ngram", "2.80×?", "1.75"]]
    assert grids.as_markdown(grid).splitlines()[2:] == [
        "| arm | d speedup | d len |",
        "| :--- | ---: | ---: |",
        "| vanilla | 1.00× | 1.00 |",
        "| ngram | 2.80×? | 1.75 |",
    ]


PAPERS_DATASETS = ["mt-bench", "gsm8k", "humaneval", "alpaca", "cnn-dm"]


def results_on(names: list[str]) -> Results:
    """The same two questions under several names."""
    rows = [replace(row, dataset=name) for name in names for row in make_results().rows]
    rows += [replace(row, arm="quantized-only") for row in rows if row.arm == "ngram"]
    return Results(make_run(config=BenchConfig(("vanilla", "ngram", "quantized-only"))), rows)


def test_many_datasets_are_split_and_end_in_the_mean() -> None:
    first, second = render.main_grids(measure(results_on([*PAPERS_DATASETS, "spec-bench"])), UNCERTAIN)
    assert [column.group for column in first.columns[1::2]] == PAPERS_DATASETS
    assert [column.group for column in second.columns[1::2]] == ["spec-bench", "mean"]
    assert second.rows[1] == ["ngram", "2.80×?", "1.75", "2.80×", "1.75"]


def test_the_papers_datasets_fit_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    console.show(*map(grids.as_table, render.result_grids(results_on(PAPERS_DATASETS))))
    shown = capsys.readouterr().out
    assert "humaneval" in shown
    assert "mean" in shown
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 100


def test_csv_holds_full_precision_and_categories() -> None:
    records = list(csv.DictReader(io.StringIO(render.as_csv(make_results()))))
    assert [(record["arm"], record["category"]) for record in records] == [
        ("vanilla", ""),
        ("ngram", ""),
        ("vanilla", "c"),
        ("ngram", "c"),
    ]
    assert float(records[1]["speedup_total"]) == 2.8
    assert float(records[1]["speedup_mean_low"]) == 2.0
    assert records[1]["speedup_total_shown"] == "False"


def of_questions(count: int, seconds: float) -> Results:
    """So many questions, on which drafts take so many seconds for four tokens, and vanilla four; one differs."""
    rows = []
    for question in range(count):
        rows.append(make_row("vanilla", question, [1] * 5, make_stats(5, 4.0, [Step(0, 0)] * 4)))
        rows.append(make_row("ngram", question, [1] * 5, make_stats(5, seconds + question, [Step(3, 3)])))
    return Results(make_run(), rows)


@pytest.mark.parametrize(
    ("questions", "seconds", "shown"), [(8, 0.1, False), (8, 9.0, True), (7, 90.0, False), (1, 90.0, False)]
)
def test_a_speedup_is_shown_by_enough_questions_whose_interval_leaves_one_out(
    questions: int, seconds: float, shown: bool
) -> None:
    results = of_questions(questions, seconds)
    cell = render.speed_grid(measure(results), UNCERTAIN).rows[1][3]
    assert cell.endswith("×" if shown else "×?")
    record = as_record(measure(results)[1])
    assert record["speedup_total_shown"] == shown
    assert "fewer than 8 questions" in words.LEGEND


def test_a_busy_machine_is_said(tmp_path: Path) -> None:
    results = make_results()
    rows = [
        replace(row, others=share, mhz=mhz)
        for row, share, mhz in zip(results.rows, (0.0, 0.6, 0.1, 0.1), (2000.0, 1500.0, 2000.0, 1999.0), strict=True)
    ]
    busy = Results(results.run, rows)
    said = words.describe_conditions(busy)
    assert said.startswith("The machine was busy during 1 of 4 answers: measure again on a quiet one. Conditions: ")
    assert "other programs took 20 % of the cores, at most 60; cores at 1500 to 2000 MHz" in said
    assert "vanilla's speed varied by 0 % between answers" in said
    write_results(busy, tmp_path / "r.json")
    assert read_results(tmp_path / "r.json") == busy


def test_what_is_not_known_of_the_machine_is_not_said() -> None:
    assert words.describe_conditions(make_results()) == (
        "Conditions: vanilla's speed varied by 0 % between answers; energy: no counter (RAPL, NVML) can be read here."
    )
    rows = [replace(row, joules=1.0) for row in make_results().rows]
    counted = Results(make_run(energy="1 processor package by RAPL"), rows)
    assert words.describe_conditions(counted).endswith("energy: 1 processor package by RAPL.")
    assert words.describe_conditions(Results(make_run(), [])) == ""


# Commands


@pytest.fixture
def counting_pair(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What decoding.load was called with; it returns models that count."""
    asked: dict[str, Any] = {}

    def load(options: LoadOptions, progress: Progress) -> Any:
        asked.update(vars(options))
        return make_pair(verifier=CountingModel(wrong_after=6))

    monkeypatch.setattr("quasar_core.api.decoding.load", load)
    return asked


BENCH = [
    "bench",
    "--dataset",
    "demo",
    "--limit",
    "2",
    "--max-new-tokens",
    "6",
    "--num-draft-tokens",
    "3",
    "--window",
    "2",
]


def test_bench_prints_tables_and_writes_results(
    counting_pair: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run([*BENCH, "-v", "--output", "r.json"]) == 0
    shown = capsys.readouterr()
    for arm in ("vanilla", "ngram", "quantized", "exact"):
        assert arm in shown.out
    assert "The result file is r.json." in shown.err
    assert "2/2" in shown.out
    assert counting_pair["verify"] == "exact"
    results = read_results(tmp_path / "r.json")
    assert {row.arm for row in results.rows} == {"vanilla", "ngram", "quantized", "exact"}


def test_an_interruption_says_how_to_go_on(
    counting_pair: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("quasar_core.bench.run.lead", interrupt)
        assert run(BENCH) == 130
    assert "the same command goes on where this run stopped" in capsys.readouterr().err
    assert run(BENCH) == 0


def test_bench_json_is_one_document(counting_pair: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*BENCH, "--arms", "vanilla,ngram", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert counting_pair["verify"] == "full"
    assert [metric["arm"] for metric in document["metrics"]] == ["vanilla", "ngram"]
    assert document["metrics"][1]["identical"] == 2
    assert document["run"]["config"]["max_new_tokens"] == 6
    assert document["errors"] == []


@pytest.mark.parametrize(
    ("flag", "begin"),
    [("--markdown", "**Speedup"), ("--csv", "dataset,temperature,category,arm,"), ("--latex", r"\begin{table}")],
)
def test_other_forms_stand_alone_on_stdout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, begin: str
) -> None:
    write_results(make_results(), tmp_path / "r.json")
    assert run(["bench", "show", "r.json", flag]) == 0
    assert capsys.readouterr().out.startswith(begin)


def test_failures_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = make_results()
    failed = make_row("ngram", 2, [], None, turn=1, error="RuntimeError: out of memory")
    write_results(Results(results.run, [*results.rows, failed]), tmp_path / "r.json")
    assert run(["bench", "show", "r.json", "--csv"]) == 0
    assert (
        "1 of 5 answers failed; the first: d question 2, ngram: RuntimeError: out of memory" in capsys.readouterr().err
    )


def test_compare_and_plot_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(make_results(), tmp_path / "a.json")
    write_results(slower(make_results(), 2), tmp_path / "b.json")
    assert run(["bench", "compare", "a.json", "b.json"]) == 0
    assert "0.500" in capsys.readouterr().out
    assert run(["bench", "compare", "a.json", "b.json", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["settings"] == [{"setting": "dtype", "before": "float32", "after": "bfloat16"}]
    pytest.importorskip("matplotlib")
    assert run(["bench", "plot", "a.json", "--output", "f.svg"]) == 0
    assert (tmp_path / "f.svg").is_file()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["bench"], "--dataset is missing"),
        (["bench", "--dataset", "other"], "--dataset must be"),
        (["bench", "--dataset", "demo", "--arms", "fast"], "--arms must be"),
        (["bench", "--dataset", "demo", "--window", "wide"], "--window must be auto or a whole number"),
        (["bench", "--dataset", "demo", "--limit", "0"], "--limit must be"),
        (["bench", "show", "missing.json"], "missing.json does not exist"),
        (["bench", "plot", "missing.json"], "missing.json does not exist"),
        (["bench", "compare", "missing.json", "missing.json"], "missing.json does not exist"),
    ],
)
def test_wrong_usage_is_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.strip().splitlines()) == 1
