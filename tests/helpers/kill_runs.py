"""Kill quantizations and let each go on: `python tests/helpers/kill_runs.py FOLDER KILLS [SEED]`.

A run is killed with SIGKILL when it is about to make a file durable: at so many of these moments, spread evenly. With
a seed it is killed after a random time in place of that. None may make again what was finished. Packages are imported
once; every run is a fork. Prints one JSON document.
"""

import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from helpers.quantize_cases import quantize, save_model

from quasar_core.quantize import calibration, commits, run
from quasar_core.quantize.blocks import layerwise
from quasar_core.quantize.commits import QuantizedBlock
from quasar_core.store import list_pairs, remove_pair
from quasar_core.store.folders import LOCK, partial_folder

Hook = Callable[[int], object]  # is called when a run makes its n-th file durable
NOTHING: frozenset[str] = frozenset()


def start(source: Path, output: Path, finished: frozenset[str] = NOTHING, hook: Hook = lambda count: None) -> int:
    """Quantize in a process of its own, which fails where it makes again what is finished."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with open(os.devnull, "w") as silent:
                os.dup2(silent.fileno(), 2)
            forbid(finished)
            call_at_files(hook)
            quantize(source, output=output)
            code = 0
        finally:
            os._exit(code)
    return child


def call_at_files(hook: Hook) -> None:
    """Call the hook with 1, 2, … before each file is made durable."""
    counts, fsync = itertools.count(1), os.fsync

    def hooked(file: int) -> None:
        hook(next(counts))
        fsync(file)

    os.fsync = hooked


def kill_at(moment: int) -> Hook:
    """Kills its own process at this file."""
    return lambda count: os.kill(os.getpid(), signal.SIGKILL) if count == moment else None


def forbid(finished: frozenset[str]) -> None:
    """Let no block be quantized and no text be written that an earlier run has finished."""
    write_commit = layerwise.write_commit

    def write(path: Path, block: QuantizedBlock, stored: Callable[[str], str]) -> None:
        assert path.name not in finished
        write_commit(path, block, stored)

    layerwise.write_commit = write
    if "calibration.safetensors" in finished:
        run.load_calibration = None
    if "quasar.json" in finished:  # whole, but not yet in its place, or not yet recorded
        run.assemble = None


def finish(child: int) -> bool:
    """Wait; whether it ended well."""
    return os.waitpid(child, 0)[1] == 0


def kill_and_resume(source: Path, output: Path, moment: int | float) -> tuple[bool, bool]:
    """Kill a run at a file or after so many seconds, and let it go on: whether it was killed, whether it ended well."""
    if isinstance(moment, int):
        child = start(source, output, hook=kill_at(moment))
    else:
        child = start(source, output)
        time.sleep(moment)
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


def shards(folder: Path) -> dict[str, bytes]:
    """The checkpoint's weights."""
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def moments_of(source: Path, folder: Path, kills: int, seed: int | None) -> list[int] | list[float]:
    """When runs are to be killed; `straight` is then a run that nobody killed."""
    log, begin = folder / "moments", time.perf_counter()
    assert finish(start(source, folder / "straight", hook=lambda count: log.write_text(str(count))))
    count, duration = int(log.read_text()), time.perf_counter() - begin
    if seed is not None:
        luck = random.Random(seed)
        return [luck.uniform(0, duration) for _ in range(kills)]
    kills = min(kills, count)
    return [1 + number * (count - 1) // max(kills - 1, 1) for number in range(kills)]


def main() -> None:
    """Compare every resumed checkpoint with that of a run nobody killed."""
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    os.environ["QUASAR_HOME"] = str(folder / "home")
    torch.set_num_threads(1)
    calibration.HELD_OUT_ROWS, calibration.GREEDY_LENGTH = 3, 40
    commits.SHARD_BYTES = 1  # every block is a shard of its own
    source, output = save_model(folder / "tiny", tied=False), folder / "killed"
    finish(start(source, folder / "first"))  # what is compiled or measured once is so now
    moments = moments_of(source, folder, kills, int(sys.argv[3]) if len(sys.argv) > 3 else None)
    expected = shards(folder / "straight")
    killed = same = 0
    for moment in moments:
        was_killed, ended_well = kill_and_resume(source, output, moment)
        killed += was_killed
        same += ended_well and is_recorded(output) and shards(output) == expected
        left = partial_folder(output).exists() or (output / LOCK).exists() or (output / "commits").exists()
        if left or not ended_well:
            break
        remove_pair(next(pair.name for pair in list_pairs() if pair.verifier == str(output)), delete_files=True)
    print(json.dumps({"runs": len(moments), "killed": killed, "identical": same}))


if __name__ == "__main__":
    main()
