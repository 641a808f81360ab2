"""Kill benches at random moments and let each go on: `python tests/helpers/kill_benches.py FOLDER KILLS [SEED]`.

No conversation that was logged may be asked again, and the result file is that of a run nobody killed, but for its
times. Prints one JSON document.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from helpers.bench_pair import CountingModel, make_pair
from helpers.kill_runs import finish

from quasar_core.bench import run as bench_run
from quasar_core.bench.arms import BenchConfig
from quasar_core.bench.datasets import Dataset, Question
from quasar_core.bench.results import read_results
from quasar_core.bench.run import run_bench

DATASET = Dataset("d", tuple(Question(number, "c", (f"w{3 + number % 7} w4", "w5")) for number in range(12)))
CONFIG = BenchConfig(("vanilla", "exact"), max_new_tokens=12, num_draft_tokens=4, window=3)


def start(output: Path, logged: int = 0) -> int:
    """Bench in a process of its own; it fails where it asks again what was logged."""
    child = os.fork()
    if child == 0:
        code, asked = 1, []
        lead = bench_run.lead
        bench_run.lead = lambda *args: (asked.append(1), lead(*args))[1]
        try:
            results = run_bench(make_pair(CountingModel(wrong_after=6)), [DATASET], CONFIG, output)
            assert len(asked) == len(DATASET.questions) * len(CONFIG.arms) - logged
            assert len(results.rows) == 2 * len(DATASET.questions) * len(CONFIG.arms)
            code = 0
        finally:
            os._exit(code)
    return child


def logged(output: Path) -> int:
    """Conversations in the log of a killed run."""
    log = output.with_name(output.name + ".partial.jsonl")
    return max(0, log.read_bytes().count(b"\n") - 1) if log.exists() else 0


def texts(output: Path) -> list[tuple[object, ...]]:
    """What was answered."""
    return sorted((row.question_id, row.arm, row.turn, row.text) for row in read_results(output).rows)


def main() -> None:
    """Kill and go on, again and again."""
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int((sys.argv[3:] or ["0"])[0])
    os.environ["QUASAR_HOME"] = str(folder / "home")
    begin = time.perf_counter()
    finish(start(folder / "straight.json"))
    duration, expected = time.perf_counter() - begin, texts(folder / "straight.json")
    moments, same, killed, in_log = random.Random(seed), 0, 0, 0
    output = folder / "killed.json"
    while killed < kills:
        child = start(output)
        time.sleep(moments.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        if not finish(child):
            killed += 1
            in_log += (before := logged(output)) > 0
            whole = output.exists() and not before  # killed after all was done
            ended_well = whole or finish(start(output, before))
            same += ended_well and texts(output) == expected
        left = sorted(os.listdir(folder))
        output.unlink(missing_ok=True)
        if left != ["killed.json", "straight.json"] and left != ["home", "killed.json", "straight.json"]:
            break
    print(json.dumps({"killed": killed, "same": same, "with_a_log": in_log, "left": left}))


if __name__ == "__main__":
    main()
