"""`make gpu-bench`: everything that only a GPU can answer, in one command of less than eight minutes, without network.

Correctness, passes against their floors, text end to end on the demo model grown to 8B, products alone, quantizing one
block; each part is useful if the time ends there. Rows go to `gpu-bench.json` in the folder that the variable OUT
names as they come, lines to stdout, a short table last. Whatever fails is a row, and makes the exit code 1.

The work is done in a process of its own. One that loses the device, dies, or hangs beyond the end of a part is
followed by another, which leaves out what was attempted and has the time that is left.
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
from quasar_core.kernels.times import device_name
from quasar_core.models.decoder import LeanDecoder
from tools.gpu_bench import correctness, end_to_end, loading, passes, products, quantize, reference
from tools.gpu_bench.models import Bench, Plan, grown_target, rounded_verifier
from tools.gpu_bench.report import FILE, Report, read_report
from tools.gpu_bench.table import summary

BUDGET_S = 480.0
GRACE_S = 60.0  # beyond the end of a part, after which a process that hangs is ended from outside Python
LAST_GRACE_S = 20.0  # the same, beyond the end of all
MOST_PROCESSES = 8
# The share of the whole time by which each part must be over.
SHARES = {
    "correctness": 0.3,
    "passes": 0.54,
    "end to end": 0.7,
    "products": 0.79,
    "launches": 0.82,
    "quantizing": 0.87,
    "loading": 0.89,
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

    def verifier(self) -> LeanDecoder:
        """Its 4-bit copy."""
        if self._verifier is None:
            target = self.target()
            self.bench.report.say("making the 4-bit copy")
            self._verifier = rounded_verifier(target, "4-bit", self.bench.report.progress)
            self.bench.report.say("made")
        return self._verifier


def run(plan: Plan, folder: Path, budget: float, only: Sequence[str] = tuple(SHARES), elapsed: float = 0.0) -> Report:
    """All parts in order, or some of them; what a process before this one attempted in these `elapsed` s left out."""
    facts = {"device": device_name(plan.device), "dtype": str(plan.dtype), "dry": plan.dry}
    report = Report(folder, facts, budget, elapsed, read_report(folder) if elapsed else None)
    bench = Bench(plan, report, read_bandwidth(plan.device))
    report.add("machine", device=device_name(plan.device), bandwidth=bench.bandwidth)
    models = Models(bench)
    parts: dict[str, Callable[[], None]] = {
        "correctness": lambda: correctness.run(bench),
        "passes": lambda: passes.run(bench, models.target(), models.verifier),
        "end to end": lambda: end_to_end.run(bench, models.target(), models.verifier()),
        "products": lambda: products.run(bench),
        "launches": lambda: passes.run_launches(bench, models.target(), models.verifier()),
        "quantizing": lambda: quantize.run(bench),
        "loading": lambda: loading.run(bench),
        "reference": lambda: reference.run(bench),
    }
    for name in only:
        report.begin(SHARES[name])
        report.say(f"part: {name}, {report.left():.0f} s left for it")
        if not plan.dry:
            end = min(report.left() + GRACE_S, budget + LAST_GRACE_S - report.elapsed)
            faulthandler.dump_traceback_later(max(end, 1), exit=True)
        report.attempt(name, "the whole part", parts[name])
    faulthandler.cancel_dump_traceback_later()
    report.write(finished=True)
    return report


def main() -> None:
    """Run, print the table, exit with 1 where anything failed."""
    options = parse()
    if not options.dry_run and not torch.cuda.is_available():
        print("Error: no CUDA device is here; --dry-run walks every step on the CPU.", file=sys.stderr)
        raise SystemExit(2)
    folder = Path(os.environ.get("OUT") or "gpu-bench-out")
    if options.elapsed_s is not None:
        run(Plan.full(torch.device("cuda", 0)), folder, options.budget_s, options.parts, options.elapsed_s)
        return
    if options.dry_run:
        run(Plan.dry_run(), folder, options.budget_s, options.parts)
    else:
        (folder / FILE).unlink(missing_ok=True)
        # What was measured or compiled before belongs to another run.
        supervise(folder, options.budget_s, {**os.environ, "QUASAR_HOME": str(folder.resolve() / "home")})
    found = read_report(folder) or {"parts": {}, "failed": True, "finished": False}
    print(summary(found["parts"]))
    failed = found["failed"] or not found["finished"]
    print(f"\nRows: {folder / FILE}. {'Something failed.' if failed else 'Nothing failed.'}")
    raise SystemExit(int(failed))


def parse() -> argparse.Namespace:
    """The options; `elapsed_s` is of a process that does the work: the seconds that are gone already."""
    parser = argparse.ArgumentParser(prog="gpu_bench", description="Answer all open questions on the GPU at hand.")
    parser.add_argument("--dry-run", action="store_true", help="walk every step on the CPU, at tiny shapes")
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES), help="some parts only")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds for everything")
    parser.add_argument("--elapsed-s", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def supervise(folder: Path, budget: float, environment: dict[str, str]) -> None:
    """Start processes that do the work until one has finished, or the time or their number is up."""
    start = time.perf_counter()
    for _ in range(MOST_PROCESSES):
        elapsed = time.perf_counter() - start
        if elapsed > budget:
            break
        ended = subprocess.run(command(elapsed), env=environment, check=False)
        found = read_report(folder)
        if found is None or found["finished"]:  # without a file it never came as far as its first part
            break
        environment = {**environment, "QUASAR_OVERLAP": "0"}  # should that be what ended it
        print(f"The process ended with code {ended.returncode}; another goes on behind it.", flush=True)


def command(elapsed: float) -> list[str]:
    """This module and its own options, run by the same Python."""
    return [sys.executable, "-m", "tools.gpu_bench.supervise", *sys.argv[1:], "--elapsed-s", f"{elapsed:.1f}"]


if __name__ == "__main__":
    main()
