"""Run the tests as other machines would: `python tests/machines.py [--quick | --all] [MACHINE …]`.

Other instruction sets, numbers of threads and cores, denormals, no C++ compiler, no C++ pass. By default the tests
whose figures a machine can change run: those of products, kernels, solvers and passes. With `--all` every test runs,
with `--quick` some on some machines. As many machines run at once as there are cores, each in one process, which
collects its tests once. Prints a table of the runs, and what failed in full; exits with 1 where anything did.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).parent
OPTIONS = ("-p", "no:cacheprovider", "--durations=0")
QUICK = ["factor", "gptq", "refine", "grid", "cpu_solver", "kernels", "products"]
QUICK += ["decoder_verifier", "engine_exactness"]
FOLDERS = ("kernels", "models", "quantize", "decode", "draft")  # where something is multiplied or added up
GPUS = ("gpu", "cuda", "triton", "marlin", "humming", "on_gpu", "upload")  # kernels that no CPU runs
FILES = ("compiled_files", "huge_pages", "stored_files", "config_options", "device", "shards", "text_log")
COUNTS = ("memory", "duration", "quantize_plan", "group_size", "weight_reads")  # bytes and operations
CLOCKS = ("kernel_choice", "steering", "live_costs", "place_costs", "policies")  # made by hand
TEXTS = ("grammar", "triggered_grammar", "engine_distribution")  # of logits made by hand


def computing() -> list[str]:
    """The files of tests whose figures a machine can change: they import PyTorch, and none of the names above."""
    found = [path for folder in FOLDERS for path in sorted((TESTS / folder).rglob("test_*.py"))]
    names = [path.stem.removeprefix("test_") for path in found if "\nimport torch\n" in path.read_text()]
    return [name for name in names if not name.startswith(GPUS) and name not in FILES + COUNTS + CLOCKS + TEXTS]


@dataclass(frozen=True)
class Machine:
    """What a machine is like: variables of its environment, and a command that its programs run under."""

    name: str
    variables: dict[str, str] = field(default_factory=dict)
    under: tuple[str, ...] = ()
    quick: bool = False


MACHINES = [
    Machine("as it is", {"OMP_NUM_THREADS": "1", "QUASAR_TEST_DENORMALS": "honour"}),
    Machine("ATen without vectors", {"ATEN_CPU_CAPABILITY": "default"}),
    Machine("ATen with AVX2", {"ATEN_CPU_CAPABILITY": "avx2"}),
    Machine("oneDNN with AVX2", {"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    Machine("four threads", {"OMP_NUM_THREADS": "4"}),
    Machine("denormals flushed", {"QUASAR_TEST_DENORMALS": "flush"}),
    Machine("no vectors, flushed", {"ATEN_CPU_CAPABILITY": "default", "QUASAR_TEST_DENORMALS": "flush"}, quick=True),
    Machine("one core", under=("taskset", "--cpu-list", str(min(os.sched_getaffinity(0))))),
    Machine("AVX-512 alone", {"QUASAR_ISA": "avx512", "QUASAR_TEST_LACKS": "avx512_vnni,avx512_bf16"}),
    Machine("AVX2", {"QUASAR_ISA": "avx2"}),
    Machine("any processor", {"QUASAR_ISA": "portable"}),
    Machine("no C++ compiler", {"CXX": "/no/compiler"}, quick=True),
    Machine("no C++ pass", {"QUASAR_CPU_PASS": "0"}),
]


@dataclass(frozen=True)
class Run:
    """What pytest's last line counts, its exit status, and all that it printed."""

    counts: dict[str, int]
    status: int
    seconds: float
    output: str

    def row(self, name: str) -> str:
        """A line of the table."""
        cells = [str(self.counts.get(what, 0)) for what in ("passed", "skipped", "failed", "error")]
        return f"| {name:<20} | {' | '.join(f'{cell:>7}' for cell in cells)} | {self.seconds:>5.0f} |"


def run_tests(machine: Machine, names: list[str], compiled: str) -> Run:
    """The tests of these files on that machine, of all files where none are named; C++ is compiled in that folder."""
    files = [str(path) for name in names for path in TESTS.rglob(f"test_{name}.py")] or [str(TESTS)]
    command = [*machine.under, sys.executable, "-m", "pytest", *OPTIONS, *files]
    begin = time.perf_counter()
    environment = {**os.environ, "QUASAR_TEST_COMPILED": compiled, **machine.variables}
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    counts = {what.removesuffix("s"): int(count) for count, what in re.findall(r"(\d+) (\w+)", last)}
    return Run(counts, done.returncode, time.perf_counter() - begin, done.stdout + done.stderr)


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="some tests, on some machines or on those named")
    extent.add_argument("--all", action="store_true", help="every test")
    parser.add_argument("machines", nargs="*", metavar="MACHINE", help=", ".join(m.name for m in MACHINES))
    arguments = parser.parse_args()
    names = [] if arguments.all else QUICK if arguments.quick else computing()
    usual = [machine.name for machine in MACHINES if machine.quick or not arguments.quick]
    chosen = [machine for machine in MACHINES if machine.name in (arguments.machines or usual)]
    failed: list[Run] = []
    print("| machine              |  passed | skipped |  failed |  errors |     s |", flush=True)
    print("|----------------------|---------|---------|---------|---------|-------|", flush=True)
    with tempfile.TemporaryDirectory() as own, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as cores:
        compiled = os.environ.get("QUASAR_TEST_COMPILED", own)
        here = [machine for machine in chosen if not machine.under or shutil.which(machine.under[0])]
        for machine, run in zip(here, cores.map(lambda m: run_tests(m, names, compiled), here), strict=True):
            print(run.row(machine.name), flush=True)
            failed += [run] * bool(run.status)
        for machine in chosen:
            if machine not in here:
                print(f"| {machine.name:<20} | {machine.under[0]} is not here", flush=True)
    for run in failed:
        print(run.output, file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
