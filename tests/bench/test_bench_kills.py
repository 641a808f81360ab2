"""Killed at a random moment, a bench goes on without asking again what it has logged; QUASAR_KILLS says how often."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.bench_pair import DATASET, CountingModel, config, make_pair

from quasar_core.bench import results
from quasar_core.bench import run as bench_run
from quasar_core.bench.run import run_bench
from quasar_core.errors import QuasarError, UsageError

KILLS = int(os.environ.get("QUASAR_KILLS", "4"))


@pytest.mark.machine
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks its runs")
def test_every_killed_bench_goes_on_to_the_same_answers(tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    command = [sys.executable, str(tests / "helpers/kill_benches.py"), str(tmp_path), str(KILLS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["killed"] == counts["same"] == KILLS


def interrupt_when_written(monkeypatch: pytest.MonkeyPatch, output: Path) -> None:
    """End a bench between its result file and the end of its log."""

    def reached(step: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(results, "reached", reached)
        with pytest.raises(KeyboardInterrupt):
            run_bench(make_pair(CountingModel()), [DATASET], config(), output)
    assert sorted(os.listdir(output.parent)) == ["r.json", "r.json.partial.jsonl"]


def test_a_log_beside_its_result_file_is_finished_with_the_same_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "r.json"
    interrupt_when_written(monkeypatch, output)
    monkeypatch.setattr("quasar_core.bench.run.lead", lambda *_: pytest.fail("asked again"))
    assert len(run_bench(make_pair(CountingModel()), [DATASET], config(), output).rows) == 16
    assert os.listdir(tmp_path) == ["r.json"]


def test_a_log_beside_its_result_file_does_not_stop_a_run_with_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "r.json"
    interrupt_when_written(monkeypatch, output)
    run_bench(make_pair(CountingModel()), [DATASET], config(("vanilla",)), output)
    assert os.listdir(tmp_path) == ["r.json"]


def test_a_log_without_its_result_file_stops_a_run_with_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "r.json"
    interrupt_when_written(monkeypatch, output)
    output.unlink()
    with pytest.raises(UsageError, match="belongs to a run with other settings"):
        run_bench(make_pair(CountingModel()), [DATASET], config(("vanilla",)), output)


def test_a_full_disk_is_one_sentence_and_keeps_what_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, calls, fsync = tmp_path / "r.json", iter(range(100)), os.fsync

    def full(descriptor: int) -> None:
        if next(calls) >= 5:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(QuasarError, match=r"partial\.jsonl could not be written: No space left on device\."):
            run_bench(make_pair(CountingModel()), [DATASET], config(), output)
    asked: list[int] = []
    original = bench_run.lead
    monkeypatch.setattr(bench_run, "lead", lambda *args: (asked.append(1), original(*args))[1])
    run_bench(make_pair(CountingModel()), [DATASET], config(), output)
    assert 0 < len(asked) < 12
