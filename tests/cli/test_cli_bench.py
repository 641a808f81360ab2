"""`quasar bench` and what looks at its result file: `show`, `compare`, `plot`, in every form."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.bench_pair import CountingModel, make_pair
from helpers.bench_records import make_results, make_row, slower

from quasar_cli.main import run
from quasar_core.bench.results import Results, read_results, write_results
from quasar_core.config import LoadOptions
from quasar_core.records import Progress

pytest_plugins = ["helpers.cli_fixtures"]
pytestmark = pytest.mark.usefixtures("own_home")


@pytest.fixture
def counting_pair(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What decoding.load was called with; it returns models that count."""
    asked: dict[str, Any] = {}

    def load(options: LoadOptions, progress: Progress, encode: Any = None) -> Any:
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


def test_a_bench_whose_answers_failed_shows_its_tables_and_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pair = make_pair(target=CountingModel(fails_on=11))
    monkeypatch.setattr("quasar_core.api.decoding.load", lambda *given: pair)
    questions = ({"question_id": n, "category": "c", "turns": [text]} for n, text in enumerate(("w5", "w3 w11 w3")))
    (tmp_path / "q.jsonl").write_text("".join(f"{json.dumps(question)}\n" for question in questions))
    asked = ["--dataset", str(tmp_path / "q.jsonl"), "--limit", "2", "--arms", "vanilla,ngram", "--output", "r.json"]
    assert run([*BENCH, *asked]) == 1
    shown = capsys.readouterr()
    assert "vanilla" in shown.out
    said = " ".join(shown.err.split())
    assert "2 of 4 answers failed; the first: q question 1, ngram: RuntimeError: out of memory" in said
    assert len(read_results(tmp_path / "r.json").errors) == 2


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
