"""Kill quantizations at random moments and let each go on: `python tests/kill_runs.py FOLDER KILLS [SEED]`.

Packages are imported once; every run is a fork that the parent kills with SIGKILL. Prints one JSON document.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from quantize_cases import quantize, save_model

from quasar_core.quantize import calibration


def start(source: Path, output: Path) -> int:
    """Quantize in a process of its own."""
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as silent:
            os.dup2(silent.fileno(), 2)
            quantize(source, output=output)
        os._exit(0)
    return child


def finish(child: int) -> bool:
    """Wait; whether it ended well."""
    return os.waitpid(child, 0)[1] == 0


def kill_and_resume(source: Path, output: Path, delay: float) -> tuple[bool, bool]:
    """Kill a run after so many seconds, and let it go on: whether it was killed in time, and whether it ended well."""
    child = start(source, output)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    killed = not finish(child)
    return killed, True if output.exists() else finish(start(source, output))


def main() -> None:
    """Compare every resumed checkpoint with that of a run nobody killed."""
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int((sys.argv[3:] or ["0"])[0])
    os.environ["QUASAR_HOME"] = str(folder / "home")
    torch.set_num_threads(1)
    calibration.HELD_OUT_ROWS, calibration.GREEDY_LENGTH = 3, 40
    source = save_model(folder / "tiny", tied=False)
    finish(start(source, folder / "first"))  # compiles the kernel that fidelity is measured with
    begin = time.perf_counter()
    finish(start(source, folder / "straight"))
    duration = time.perf_counter() - begin
    expected = (folder / "straight" / "model.safetensors").read_bytes()
    moments, same, killed, rounds = random.Random(seed), 0, 0, 0
    while killed < kills:
        rounds += 1
        in_time, _ = kill_and_resume(source, folder / "killed", moments.uniform(0, duration))
        if in_time:
            killed += 1
            same += (folder / "killed" / "model.safetensors").read_bytes() == expected
        left = (folder / "killed.partial").exists()
        shutil.rmtree(folder / "killed")
        if left:
            break
    print(json.dumps({"killed": killed, "identical": same, "runs": rounds, "seconds_of_a_run": round(duration, 3)}))


if __name__ == "__main__":
    main()
