"""Several runs beside the first, marks where a change is shown, and an exit code for CI."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.bench_records import make_row, make_run, make_stats

from quasar_cli.main import run
from quasar_core.bench.metrics.compare import compare
from quasar_core.bench.results import Results, write_results
from quasar_core.records import Step

pytest_plugins = ["helpers.cli_fixtures"]
pytestmark = pytest.mark.usefixtures("own_home")


def results(slower: float = 1.0, uneven: float = 0.0, questions: int = 10) -> Results:
    """Ngram takes `slower` times as long; every other question by `uneven` more or less."""
    rows = []
    for number in range(questions):
        seconds = slower * (1 + uneven * (-1) ** number)
        rows.append(make_row("vanilla", number, [1] * 5, make_stats(5, 4.0, [Step(0, 0)] * 4)))
        rows.append(make_row("ngram", number, [1] * 5, make_stats(5, seconds, [Step(3, 3)])))
    return Results(make_run(), rows)


def test_a_change_is_marked_where_its_interval_leaves_one_out() -> None:
    changes = {(one.arm, one.quantity): one for one in compare(results(), results(1.25)).changes}
    speed = changes["ngram", "tokens/s"]
    assert speed.ratio == pytest.approx(0.8)
    assert speed.is_shown is True
    assert changes["vanilla", "tokens/s"].is_shown is False
    assert changes["ngram", "acceptance length"].is_shown is None
    noisy = {(one.arm, one.quantity): one for one in compare(results(), results(1.02, uneven=0.5)).changes}
    assert noisy["ngram", "tokens/s"].is_shown is False


@pytest.mark.parametrize(
    ("slower", "uneven", "allowed", "code"),
    [(1.25, 0.0, "5%", 1), (1.04, 0.0, "5%", 0), (1.25, 0.0, "30", 0), (0.5, 0.0, "0%", 0), (1.25, 0.0, None, 0)],
)
def test_a_regression_ends_with_1(
    slower: float, uneven: float, allowed: str | None, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    write_results(results(), Path("a.json"))
    write_results(results(slower, uneven), Path("b.json"))
    asked = [] if allowed is None else ["--max-regression", allowed]
    assert run(["bench", "compare", "a.json", "b.json", *asked]) == code
    said = capsys.readouterr().err
    assert ("fell from 4.00 to 3.20" in said) == bool(code)


def test_what_is_no_percentage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("x", "-1%", "100%"):
        assert run(["bench", "compare", "a.json", "b.json", "--max-regression", text]) == 2
        assert "--max-regression must be a percentage such as 5%" in capsys.readouterr().err
    assert run(["bench", "compare", "a.json"]) == 2
    assert "at least two result files" in capsys.readouterr().err


def test_several_runs_are_set_beside_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    for name, slower in (("a", 1.0), ("b", 2.0), ("c", 4.0)):
        write_results(results(slower), Path(f"{name}.json"))
    assert run(["bench", "compare", "a.json", "b.json", "c.json"]) == 0
    shown = capsys.readouterr()
    assert "Changes to b.json" in shown.out
    assert "0.500*" in shown.out
    assert "0.250*" in shown.out
    assert "leaves 1 out" in shown.err
    assert run(["bench", "compare", "a.json", "b.json", "c.json", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["file"], document["others"][0]["file"]) == ("b.json", "c.json")
    assert document["changes"][1]["resampled"]["value"] == pytest.approx(0.5)


def test_a_file_of_version_1_is_read_and_compared() -> None:
    write_results(results(), Path("new.json"))
    content = json.loads(Path("new.json").read_text())
    content["format_version"] = 1
    config = content["config"]
    config["temperature"] = config.pop("temperatures")[0]
    for name in ("run_code", "peers"):
        del config[name]
    for name in ("passes", "bandwidth", "peers"):
        del content[name]
    for row in content["rows"]:
        for name in ("temperature", "lengths", "refused", "reference", "correct", "joules"):
            del row[name]
    Path("old.json").write_text(json.dumps(content))
    assert run(["bench", "compare", "old.json", "new.json", "--max-regression", "0"]) == 0
    content["config"]["temperature"] = 0.7
    Path("old.json").write_text(json.dumps(content))
    assert run(["bench", "show", "old.json", "--recompute"]) == 0
    assert run(["bench", "report", "old.json", "-o", "old.html"]) == 0


def test_the_same_questions_are_compared_wherever_they_were_read() -> None:
    other = results()
    datasets = {name: {**facts, "source": "the hub, a/b@C"} for name, facts in other.run.datasets.items()}
    assert compare(results(), Results(replace(other.run, datasets=datasets), other.rows)).changes


def test_the_arms_own_text_has_no_part_in_a_comparison_of_others() -> None:
    other = results()
    rows = [replace(row, arm="exact") if row.arm == "ngram" else row for row in other.rows]
    found = compare(
        results(), Results(replace(other.run, config=replace(other.run.config, arms=("vanilla", "exact"))), rows)
    )
    assert {change.arm for change in found.changes} == {"vanilla"}
