"""Killed at any file, a quantization goes on to the identical checkpoint: a handful here, all of them in `slow`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks its runs")
TESTS = Path(__file__).parents[1]


def kill_runs(folder: Path, *arguments: int) -> dict[str, int]:
    """What the script counts; without the C++ pass, which takes longer to compile than all runs."""
    command = [sys.executable, str(TESTS / "helpers" / "kill_runs.py"), str(folder), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    environment |= {"QUASAR_CPU_PASS": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_killed_at_a_file_goes_on_to_the_identical_checkpoint(tmp_path: Path) -> None:
    """At the first, at the last, and at one between."""
    assert kill_runs(tmp_path, 3) == {"runs": 3, "killed": 3, "identical": 3}


@pytest.mark.slow
def test_a_run_killed_at_any_file_goes_on(tmp_path: Path) -> None:
    counts = kill_runs(tmp_path, 1000)
    assert 4 < counts["runs"] == counts["killed"] == counts["identical"]


@pytest.mark.machine
def test_runs_killed_after_random_times_go_on(tmp_path: Path) -> None:
    """Some end before they are killed."""
    counts = kill_runs(tmp_path, 12, 0)
    assert 0 < counts["killed"] <= counts["identical"] == 12
