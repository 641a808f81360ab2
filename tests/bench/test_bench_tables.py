"""What a bench shows: result files read again, compared, plotted, drawn as tables."""

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.bench_records import make_results, make_row, make_run, make_stats, slower

from quasar_cli import console
from quasar_cli.render import bench as render
from quasar_cli.render import bench_words as words
from quasar_cli.render import grids
from quasar_core.bench.arms import BenchConfig
from quasar_core.bench.metrics.arm_metrics import measure
from quasar_core.bench.metrics.compare import compare
from quasar_core.bench.metrics.document import as_record
from quasar_core.bench.plots import accepted_per_step, draw_accepted, draw_speedups, plot
from quasar_core.bench.results import Results, read_results, write_results
from quasar_core.errors import QuasarError, UsageError
from quasar_core.records import Step

pytest_plugins = ["helpers.cli_fixtures"]
pytestmark = pytest.mark.usefixtures("own_home")


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
