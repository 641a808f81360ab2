"""Kill quantizations at random moments and let each go on: `python tests/kill_runs.py FOLDER KILLS [SEED]`.

None may make again what was finished.

Packages are imported once; every run is a fork that the parent kills with SIGKILL. Prints one JSON document.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from quantize_cases import quantize, save_model

from quasar_core.quantize import calibration, layerwise, run
from quasar_core.quantize.commits import QuantizedBlock
from quasar_core.store import list_pairs, remove_pair
from quasar_core.store.folders import LOCK, partial_folder


def start(source: Path, output: Path, finished: frozenset[str] = frozenset()) -> int:
    """Quantize in a process of its own, which fails where it makes again what is finished."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with open(os.devnull, "w") as silent:
                os.dup2(silent.fileno(), 2)
            forbid(finished)
            quantize(source, output=output)
            code = 0
        finally:
            os._exit(code)
    return child


def forbid(finished: frozenset[str]) -> None:
    """Let no block be quantized and no text be written that an earlier run has finished."""
    write_commit = layerwise.write_commit

    def write(path: Path, block: QuantizedBlock) -> None:
        assert path.name not in finished
        write_commit(path, block)

    layerwise.write_commit = write
    if "calibration.safetensors" in finished:
        run.load_calibration = None
    if "quasar.json" in finished:  # whole, but not yet in its place, or not yet recorded
        run.assemble = None


def finish(child: int) -> bool:
    """Wait; whether it ended well."""
    return os.waitpid(child, 0)[1] == 0


def kill_and_resume(source: Path, output: Path, delay: float) -> tuple[bool, bool]:
    """Kill a run after so many seconds, and let it go on: whether it was killed in time, and whether it ended well."""
    child = start(source, output)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    killed = not finish(child)
    done = is_recorded(output) and not (output / LOCK).exists()
    return killed, done or finish(start(source, output, finished_work(output)))


def finished_work(output: Path) -> frozenset[str]:
    """What a killed run has finished: its commits, and the card that is written last."""
    places = [partial_folder(output), output]
    found = {path.name for place in places for path in (place / "commits").glob("*.safetensors")}
    return frozenset(found | {path.name for place in places for path in place.glob("quasar.json")})


def is_recorded(output: Path) -> bool:
    """Whether a pair names it."""
    return any(pair.verifier == str(output) for pair in list_pairs())


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
        output = folder / "killed"
        in_time, ended_well = kill_and_resume(source, output, moments.uniform(0, duration))
        if in_time:
            killed += 1
            same += ended_well and is_recorded(output) and (output / "model.safetensors").read_bytes() == expected
        left = partial_folder(output).exists() or (output / LOCK).exists() or (output / "commits").exists()
        if left or not ended_well:
            break
        remove_pair(next(pair.name for pair in list_pairs() if pair.verifier == str(output)), delete_files=True)
    print(json.dumps({"killed": killed, "identical": same, "runs": rounds, "seconds_of_a_run": round(duration, 3)}))


if __name__ == "__main__":
    main()
