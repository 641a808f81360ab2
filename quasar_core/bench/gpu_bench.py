"""`make gpu-bench`: everything that only a GPU can answer, in one command of less than eight minutes, without network.

Correctness, passes and products against their floors, text end to end on the demo model grown to 8B, quantizing one
block; each part is useful if the time ends there. Rows go to `gpu-bench.json` in the folder that the variable OUT
names as they come, lines to stdout, a short table last. Whatever fails is a row, and makes the exit code 1.
"""

import argparse
import faulthandler
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from quasar_core.bench import (
    gpu_correctness,
    gpu_end_to_end,
    gpu_loading,
    gpu_passes,
    gpu_products,
    gpu_quantize,
    gpu_reference,
)
from quasar_core.bench.bandwidth import read_bandwidth
from quasar_core.bench.gpu_models import Bench, Plan, grown_target, rounded_verifier
from quasar_core.bench.gpu_report import Report
from quasar_core.bench.gpu_table import summary
from quasar_core.kernels.identity import device_name
from quasar_core.models.decoder import LeanDecoder

BUDGET_S = 480.0
GRACE_S = 40.0  # beyond the budget, after which a bench that hangs is ended from outside Python
# The share of the whole time by which each part must be over.
SHARES = {
    "correctness": 0.3,
    "passes": 0.54,
    "products": 0.66,
    "end to end": 0.83,
    "quantizing": 0.89,
    "loading": 0.92,
    "reference": 1,
}


class Models:
    """The grown target and its 4-bit verifier, made when a part first needs them and kept."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._pair: tuple[LeanDecoder, LeanDecoder] | None = None

    def pair(self) -> tuple[LeanDecoder, LeanDecoder]:
        """Both models."""
        if self._pair is None:
            report = self.bench.report
            report.say("making the grown model and its 4-bit copy")
            target = grown_target(self.bench.plan, report.progress)
            self._pair = target, rounded_verifier(target, "4-bit", report.progress)
            report.say("made")
        return self._pair


def run(plan: Plan, folder: Path, budget: float, only: Sequence[str] = tuple(SHARES)) -> Report:
    """All parts in order, or some of them."""
    report = Report(folder, {"device": device_name(plan.device), "dtype": str(plan.dtype), "dry": plan.dry}, budget)
    bench = Bench(plan, report, read_bandwidth(plan.device))
    report.add("machine", device=device_name(plan.device), bandwidth=bench.bandwidth)
    models = Models(bench)
    parts: dict[str, Callable[[], None]] = {
        "correctness": lambda: gpu_correctness.run(bench),
        "passes": lambda: gpu_passes.run(bench, *models.pair()),
        "products": lambda: gpu_products.run(bench),
        "end to end": lambda: gpu_end_to_end.run(bench, *models.pair()),
        "quantizing": lambda: gpu_quantize.run(bench),
        "loading": lambda: gpu_loading.run(bench),
        "reference": lambda: gpu_reference.run(bench),
    }
    for name in only:
        report.begin(SHARES[name])
        report.say(f"part: {name}, {report.left():.0f} s left for it")
        report.attempt(name, "the whole part", parts[name])
    report.write()
    return report


def main() -> None:
    """Run, print the table, exit with 1 where anything failed."""
    parser = argparse.ArgumentParser(prog="gpu_bench", description="Answer all open questions on the GPU at hand.")
    parser.add_argument("--dry-run", action="store_true", help="walk every step on the CPU, at tiny shapes")
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES), help="some parts only")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds for everything")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.exit(2, "Error: no CUDA device is here; --dry-run walks every step on the CPU.\n")
    folder = Path(os.environ.get("OUT") or "gpu-bench-out")
    if not options.dry_run:  # what was measured or compiled before belongs to another run
        os.environ["QUASAR_HOME"] = str(folder.resolve() / "home")
        faulthandler.dump_traceback_later(options.budget_s + GRACE_S, exit=True)
    plan = Plan.dry_run() if options.dry_run else Plan.full(torch.device("cuda", 0))
    report = run(plan, folder, options.budget_s, options.parts)
    print(summary(report.parts))
    print(f"\nRows: {report.path}. {'Something failed.' if report.failed else 'Nothing failed.'}")
    raise SystemExit(int(report.failed))


if __name__ == "__main__":
    main()
