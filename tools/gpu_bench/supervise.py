"""`make gpu-bench`: everything that only a GPU can answer, in calls of less than eight minutes, without network.

Facts and a case of each kernel come first, then the headline: passes of target and 4-bit verifier. Each part is useful
if the time ends there. Rows go to `gpu-bench.json` in the folder that the variable OUT names as they come, lines to
stdout, a short table last. Whatever fails is a row, and makes the exit code 1.

Each part runs in a process of its own. One that loses the device, dies, or says nothing for a minute is followed by
another, one rung down the ladder (`ladder.py`). What Triton compiled is packed beside the rows, and taken from there
with --cache, so that a second call compiles nothing.
"""

import argparse
import faulthandler
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from quasar_core.bench.steps import read_bandwidth
from quasar_core.files import write_json
from quasar_core.kernels.times import device_name
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from tools.gpu_bench import (
    compiled,
    correctness,
    end_to_end,
    headline,
    loading,
    mixtures,
    offload,
    passes,
    products,
    quantize,
    reference,
)
from tools.gpu_bench import facts as facts_of
from tools.gpu_bench.ladder import LAST, Fault, describe, variables
from tools.gpu_bench.models import Bench, Plan, grown_target, rounded_verifier
from tools.gpu_bench.report import FILE, Report, read_report
from tools.gpu_bench.table import summary

BUDGET_S = 480.0
GRACE_S = 60.0  # beyond the end of all, after which a process is killed
MOST_PROCESSES = 24
# The share of the whole time by which each part must be over; where some are asked for, all of it is theirs.
SHARES = {
    "facts": 0.06,
    "smoke": 0.14,
    "headline": 0.36,
    "correctness": 0.44,
    "passes": 0.54,
    "mixtures": 0.58,
    "end to end": 0.7,
    "products": 0.79,
    "launches": 0.81,
    "quantizing": 0.85,
    "loading": 0.87,
    "offload": 0.96,
    "reference": 1,
}


class Models:
    """The grown target and its 4-bit verifier, made when a part first needs them and kept."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._target: LeanDecoder | None = None
        self._verifier: LeanDecoder | None = None

    def target(self) -> LeanDecoder:
        """The grown model."""
        if self._target is None:
            self.bench.report.say("making the grown model")
            self._target = grown_target(self.bench.plan, self.bench.report.progress)
            self.bench.report.say("made")
        return self._target

    def verifier(self, name: str = "4-bit") -> LeanDecoder:
        """Its 4-bit copy."""
        if self._verifier is None:
            target = self.target()
            self.bench.report.say("making the 4-bit copy")
            self._verifier = rounded_verifier(target, name, self.bench.report.progress)
            self.bench.report.say("made")
        return self._verifier


def run(
    plan: Plan,
    folder: Path,
    budget: float,
    only: Sequence[str] = tuple(SHARES),
    elapsed: float = 0.0,
    rung: int | None = None,
    fault: Fault | None = None,
    last: str | None = None,
) -> Report:
    """Some parts, in order, in this process; one that a supervisor started is on a `rung` of the ladder.

    `last` is the last one of all that were asked for, here or in other processes.
    """
    facts = {"device": device_name(plan.device), "dtype": str(plan.dtype), "dry": plan.dry}
    is_child = rung is not None
    earlier = read_report(folder) if is_child else None
    report = Report(folder, facts, budget, elapsed, earlier, LAST if rung is None else rung, watches=is_child)
    bench = Bench(plan, report, read_bandwidth(plan.device))
    models = Models(bench)
    faults = fault or Fault("crash", "none", 0)
    parts: dict[str, Callable[[], None]] = {
        "facts": lambda: facts_of.run(bench),
        "smoke": lambda: headline.run_smoke(bench),
        "headline": lambda: headline.run(bench),
        "correctness": lambda: correctness.run(bench),
        "passes": lambda: passes.run(bench, models.target(), models.verifier),
        "mixtures": lambda: mixtures.run(bench),
        "end to end": lambda: end_to_end.run(bench, models.target(), models.verifier("4-bit, searched")),
        "products": lambda: products.run(bench),
        "launches": lambda: passes.run_launches(bench, models.target(), models.verifier()),
        "quantizing": lambda: quantize.run(bench),
        "loading": lambda: loading.run(bench),
        "offload": lambda: offload.run(bench),
        "reference": lambda: reference.run(bench),
    }
    whole = SHARES[last] if last else last_share(only)
    for name in only:
        report.begin(SHARES[name] / whole)
        report.say(f"part: {name}, {report.left():.0f} s left for it, {describe(report.rung)}")

        def measure(name: str = name) -> None:
            faults.strike(name, report.rung)
            parts[name]()

        report.attempt(name, "the whole part", measure)
        report.end(name)
    faulthandler.cancel_dump_traceback_later()
    report.write(finished=True)
    return report


def last_share(parts: Sequence[str]) -> float:
    """By which the last of some parts is over."""
    return max(SHARES[part] for part in parts)


def main() -> None:
    """Run, print the table, exit with 1 where anything failed."""
    options = parse()
    if not options.dry_run and not torch.cuda.is_available():
        print("Error: no CUDA device is here; --dry-run walks every step on the CPU.", file=sys.stderr)
        raise SystemExit(2)
    folder = Path(os.environ.get("OUT") or "gpu-bench-out")
    plan = Plan.dry_run() if options.dry_run else Plan.full(torch.device("cuda", 0))
    if options.rung is not None:
        fault = Fault.parse(options.fault) if options.fault else None
        run(plan, folder, options.budget_s, options.parts, options.elapsed_s, options.rung, fault, options.last)
        return
    (folder / FILE).unlink(missing_ok=True)
    # What was measured before belongs to another run; what was compiled does not.
    home = {"QUASAR_HOME": str(folder.resolve() / "home"), "TRITON_CACHE_DIR": str(folder.resolve() / "compiled")}
    home["TRITON_STORE_BINARY_ONLY"] = "1"
    compiled.unpack(options.cache, folder / "compiled")
    supervise(folder, options.budget_s, {**os.environ, **home}, options.parts)
    compiled.pack(folder / "compiled", folder / compiled.FILE)
    found = read_report(folder) or {"parts": {}, "failed": True, "finished": False}
    print(summary(found["parts"]))
    failed = found["failed"] or not found["finished"]
    print(f"\nRows: {folder / FILE}. {'Something failed.' if failed else 'Nothing failed.'}")
    raise SystemExit(int(failed))


def parse() -> argparse.Namespace:
    """The options; `rung` and `elapsed_s` are of a process that does the work, `fault` is for dry runs."""
    parser = argparse.ArgumentParser(prog="gpu_bench", description="Answer all open questions on the GPU at hand.")
    parser.add_argument("--dry-run", action="store_true", help="walk every step on the CPU, at tiny shapes")
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES), help="some parts only")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds for everything")
    parser.add_argument("--cache", type=Path, help="what an earlier call compiled: its compiled.tar.gz")
    parser.add_argument("--fault", help="of a dry run, such as crash:headline:2 (crash, hang or compile; part; rungs)")
    parser.add_argument("--elapsed-s", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--rung", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--last", choices=SHARES, help=argparse.SUPPRESS)
    return parser.parse_args()


def supervise(folder: Path, budget: float, environment: dict[str, str], parts: Sequence[str] = tuple(SHARES)) -> None:
    """A process for each part, and another one rung down where one ends before its part has, until the time is up."""
    start, rung, waiting = time.perf_counter(), 0, list(parts)
    last = max(parts, key=SHARES.__getitem__)
    for _ in range(MOST_PROCESSES):
        left = budget - (time.perf_counter() - start)
        if not waiting or left <= 0:
            break
        line, own = command(waiting[0], rung, budget - left, last), {**environment, **variables(rung)}
        ended = _run_process(line, own, left + GRACE_S)
        found = read_report(folder)
        if found is None:  # it never came as far as its first part
            break
        if waiting[0] in found["ended"]:
            del waiting[0]
            continue
        rung = min(rung + 1, LAST)
        print(f"The process of {waiting[0]} ended ({ended}); another goes on: {describe(rung)}.", flush=True)
    found = read_report(folder)
    if found is not None:
        write_json(folder / FILE, {**found, "finished": not waiting})


def _run_process(line: list[str], environment: dict[str, str], seconds: float) -> str:
    """Run it to its end, or so many seconds; how it ended."""
    try:
        return f"code {subprocess.run(line, env=environment, check=False, timeout=seconds).returncode}"
    except subprocess.TimeoutExpired:
        return "killed, as the time was up"


def command(part: str, rung: int, elapsed: float, last: str) -> list[str]:
    """This module and its own options for one part, run by the same Python."""
    own = ["--parts", part, "--rung", str(rung), "--elapsed-s", f"{elapsed:.1f}", "--last", last]
    return [sys.executable, "-m", "tools.gpu_bench.supervise", *sys.argv[1:], *own]  # of an option given twice the last


if __name__ == "__main__":
    main()
