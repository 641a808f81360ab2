"""Killed at a random moment, a quantization goes on to the identical checkpoint: a handful here, QUASAR_KILLS more."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = int(os.environ.get("QUASAR_KILLS", "4"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks its runs")
def test_every_killed_run_goes_on_to_the_identical_checkpoint(tmp_path: Path) -> None:
    tests = Path(__file__).parent
    command = [sys.executable, str(tests / "kill_runs.py"), str(tmp_path), str(KILLS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["killed"] == counts["identical"] == KILLS
