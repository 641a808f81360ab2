"""Every figure again, by the package's second way and by a few lines here that share nothing with either."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.bench_pair import CountingModel, make_pair

from quasar_cli.main import run
from quasar_core.bench.arms import BenchConfig
from quasar_core.bench.datasets import Dataset, Question
from quasar_core.bench.metrics import arm_metrics as metrics
from quasar_core.bench.metrics import recompute, speculation
from quasar_core.bench.metrics.arm_metrics import measure
from quasar_core.bench.metrics.document import as_record
from quasar_core.bench.metrics.estimates import estimate
from quasar_core.bench.metrics.recompute import differences
from quasar_core.bench.results import Results, write_results
from quasar_core.bench.run import run_bench

pytest_plugins = ["helpers.cli_fixtures"]
pytestmark = pytest.mark.usefixtures("own_home")
ARMS = ("vanilla", "ngram", "quantized", "exact")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    questions = [Question(number, f"k{number % 2}", (f"w{3 + number % 7} w4", "w5")) for number in range(9)]
    config = BenchConfig(ARMS, (0.0, 1.0), repeats=2, max_new_tokens=12, num_draft_tokens=4, window=3)
    pair = make_pair(CountingModel(wrong_after=6))
    found = run_bench(pair, [Dataset("d", tuple(questions))], config, tmp_path_factory.mktemp("run") / "r.json")
    # Seconds of a fake clock: by the passes, so that the intervals are the same on every machine.
    rows = [
        replace(row, stats=replace(row.stats, decode_s=0.01 * row.stats.steps + 0.02 * row.stats.confirms + 0.001))
        for row in found.rows
        if row.stats
    ]
    return Results(found.run, rows, found.divergences)


def test_a_few_lines_give_the_tables_figures(results: Results, tmp_path: Path) -> None:
    write_results(results, tmp_path / "r.json")
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    for metric in measure(results):
        of = {
            arm: [r["stats"] for r in rows if (r["arm"], r["temperature"]) == (arm, metric.temperature)]
            for arm in ("vanilla", metric.arm)
        }
        tokens = {arm: sum(s["new_tokens"] - s["prefill_tokens"] for s in stats) for arm, stats in of.items()}
        seconds = {arm: sum(s["decode_s"] for s in stats) for arm, stats in of.items()}
        steps = sum(len(s["step_log"]) for s in of[metric.arm])
        assert metric.acceptance_length == tokens[metric.arm] / steps
        assert metric.tokens_per_s == pytest.approx(tokens[metric.arm] / seconds[metric.arm], rel=1e-12)
        assert metric.speedup_total is not None
        assert metric.speedup_total.value == pytest.approx(
            tokens[metric.arm] / seconds[metric.arm] * seconds["vanilla"] / tokens["vanilla"], rel=1e-12
        )


def test_the_second_way_agrees_on_everything(results: Results, tmp_path: Path) -> None:
    write_results(results, tmp_path / "r.json")
    count, wrong = differences(tmp_path / "r.json", results)
    assert wrong == []
    assert count > 1000


PLACES = {"dataset", "temperature", "category", "arm"}
JUDGED = re.compile("speedup_.*_(low|high|shown|uncertain)")  # by another resampling, below; or of the figures


def test_every_column_of_the_tables_is_computed_again(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever is changed on the way to the tables, it is named."""
    write_results(results, tmp_path / "r.json")
    columns = as_record(measure(results)[0]).keys() - PLACES
    changed = {name: -7.0 for name in columns if not JUDGED.fullmatch(name)}
    monkeypatch.setattr(recompute, "as_record", lambda metric: {**as_record(metric), **changed})
    _, wrong = differences(tmp_path / "r.json", results)
    for column in changed:
        assert any(f": {column}: -7.0, but " in line for line in wrong), column


@pytest.mark.parametrize("split", ["by_place", "by_drafter", "by_position", "refused_by_margin"])
def test_the_tables_of_drafts_are_computed_again(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    write_results(results, tmp_path / "r.json")
    shown = getattr(speculation, split)
    monkeypatch.setattr(
        speculation,
        split,
        lambda *arguments: [replace(share, count=share.count + 1) for share in shown(*arguments)],
    )
    _, wrong = differences(tmp_path / "r.json", results)
    assert any(f"parts of {split}: " in line for line in wrong)


def test_an_interval_that_another_resampling_does_not_give_is_named(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_results(results, tmp_path / "r.json")
    monkeypatch.setattr(metrics, "estimate", lambda *asked: replace(estimate(*asked), interval=(0.1, 9.0)))
    _, wrong = differences(tmp_path / "r.json", results)
    assert any("speedup_total, interval, low: 0.1, but" in line for line in wrong)
    assert any("speedup_mean, interval, high: 9.0, but" in line for line in wrong)
    assert any("speedup_answers, interval, high: 9.0, but" in line for line in wrong)


def test_figures_that_the_rows_give_are_the_same(
    results: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_results(results, tmp_path / "r.json")
    assert run(["bench", "show", "r.json", "--recompute"]) == 0
    assert "figures were computed again from the rows, and are the same" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('"acceptance_length": 1.0,', '"acceptance_length": 1.5,', "acceptance_length: 1.5, but 1.0"),
        ('"new_tokens": 12', '"new_tokens": 13', "new_tokens: 13, but 12"),
        ('"steps": 11', '"steps": 10', "steps: 10, but 11"),
    ],
)
def test_a_figure_that_the_rows_do_not_give_is_named(
    results: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, named: str
) -> None:
    write_results(results, tmp_path / "r.json")
    text = (tmp_path / "r.json").read_text()
    assert old in text
    (tmp_path / "r.json").write_text(text.replace(old, new, 1))
    assert run(["bench", "show", "r.json", "--recompute"]) == 1
    assert named in " ".join(capsys.readouterr().err.split())
