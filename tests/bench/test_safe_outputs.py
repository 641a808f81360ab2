"""A bench, its plots, pages and traces replace no file that quasar did not write."""

import json
import os
from pathlib import Path

import pytest
from helpers.bench_pair import DATASET, CountingModel, config, make_pair
from helpers.bench_records import make_results
from helpers.folders import contents

from quasar_cli.main import run
from quasar_core.bench.results import write_results
from quasar_core.bench.run import run_bench
from quasar_core.errors import UsageError


@pytest.mark.parametrize("content", ["my notes", "[]", '{"format_version": 1, "pairs": []}', '{"rows": '])
@pytest.mark.parametrize("name", ["results.json", "results.json.partial.jsonl"])
def test_a_bench_replaces_no_file_of_others(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=f"{name} exists and is not a result file of quasar bench, so it is not"):
        run_bench(make_pair(CountingModel()), [DATASET], config(), tmp_path / "results.json", resume=False)
    assert contents(tmp_path) == {name: content.encode()}


def test_a_bench_replaces_a_result_file_of_an_earlier_version(tmp_path: Path) -> None:
    """Such a file lacks what was added to a run since."""
    path = tmp_path / "results.json"
    write_results(make_results(), path)
    content = json.loads(path.read_text())
    added = {"passes", "bandwidth", "peers", "energy"}
    assert added <= content.keys()
    path.write_text(json.dumps({name: value for name, value in content.items() if name not in added}))
    run_bench(make_pair(CountingModel()), [DATASET], config(), path, resume=False)
    assert added <= json.loads(path.read_text()).keys()


def test_a_bench_refuses_before_it_loads_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("quasar_core.api.decoding.load", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr("quasar_core.api.measuring.random_candidates", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "mine.json").write_text('{"a": 1}')
    (tmp_path / "folder").mkdir()
    output = str(tmp_path / "mine.json")
    for place in (output, str(tmp_path / "folder")):
        assert run(["bench", "--dataset", "demo", "--output", place]) == 2
        assert run(["bench", "steps", "--shape", "qwen3-0.6b", "--output", place]) == 2
    assert capsys.readouterr().err.count("so it is not replaced; name another --output.") == 4
    assert (tmp_path / "mine.json").read_text() == '{"a": 1}'


@pytest.mark.parametrize(
    "command",
    [
        ["bench", "--dataset", "demo", "--output"],
        ["bench", "steps", "--shape", "qwen3-0.6b", "--output"],
        ["bench", "steps", "--shape", "qwen3-0.6b", "--plot"],
        ["bench", "plot", "results.json", "--output"],
        ["bench", "report", "results.json", "--output"],
        ["inspect", "--plot"],
        ["generate", "x", "--trace"],
    ],
    ids=" ".join,
)
def test_a_file_without_a_place_is_refused_before_any_work_and_no_folder_is_made(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("decoding.load", "measuring.load", "measuring.random_candidates", "measuring.inspect"):
        monkeypatch.setattr(f"quasar_core.api.{name}", lambda *_, **__: pytest.fail("work was begun"))
    write_results(make_results(), tmp_path / "results.json")
    before, suffix = contents(tmp_path), {"plot": "png", "report": "html"}.get(command[1], "json")
    suffix = "png" if command[-1] == "--plot" else suffix
    assert run([*command, f"missing/out.{suffix}"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"Error: There is no folder missing: make it, or name another {command[-1]}." in said
    assert run([*command, f"results.json/out.{suffix}"]) == 2
    assert "There is no folder results.json: make it" in " ".join(capsys.readouterr().err.split())

    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert run([*command, f"out.{suffix}"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f". cannot be written in (Read-only file system): name another {command[-1]}." in said
    assert contents(tmp_path) == before


def test_a_bench_replaces_its_own_results(tmp_path: Path) -> None:
    pair, output = make_pair(CountingModel()), tmp_path / "results.json"
    first = run_bench(pair, [DATASET], config(), output)
    write_results(first, output)
    output.write_text(json.dumps(json.loads(output.read_text()), indent=2))  # as somebody reads it
    run_bench(pair, [DATASET], config(("vanilla",)), output)
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_plot_replaces_only_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from quasar_core.bench.plots import plot

    for name in ("own.png", "own.svg"):
        plot(make_results(), tmp_path / name)
        plot(make_results(), tmp_path / name)
        photo = tmp_path / f"photo{name[3:]}"
        figure = Figure()
        figure.subplots().plot([1, 2])
        figure.savefig(photo)
        before = photo.read_bytes()
        with pytest.raises(UsageError, match="exists and is not a figure that quasar drew, so it is not replaced"):
            plot(make_results(), photo)
        assert photo.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["own.png", "own.svg", "photo.png", "photo.svg"]
