"""What the solver allocates, counted tensor by tensor, against what the plan says of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.allocations import Allocations

from quasar_core.quantize.plan import SOLVER_RESERVE, Shape, solver_bytes
from quasar_core.quantize.solve.gptq import SolverConfig, solve_group
from quasar_core.quantize.solve.hessian import error_correlation

# Inputs, and outputs of the layers that share them.
SMALL = [(1536, (64,)), (1024, (1024, 64)), (1536, (512,))]
LARGE = [(4096, (64,)), (1024, (8192, 8192))]


def planned_bytes(columns: int, outs: tuple[int, ...]) -> int:
    shape = Shape({f"model.layers.0.mlp.{i}": (out, columns) for i, out in enumerate(outs)}, 0, 0, columns, 1)
    return solver_bytes(shape, on_device=False)


@torch.inference_mode()
def allocated(columns: int, outs: tuple[int, ...], config: SolverConfig) -> int:
    """Bytes at the worst moment of solving such layers, but for the codes, which the plan counts with the block."""
    weights = {str(i): torch.randn(out, columns).bfloat16() for i, out in enumerate(outs)}
    rows = torch.randn(256, columns)
    with Allocations() as counted:
        hessian = torch.zeros(columns, columns).addmm_(rows.t(), rows, alpha=2 / 256)
        errors = torch.randn(outs[0] if len(outs) == 1 else columns, columns).mul_(0.01)
        lacking = error_correlation(weights, errors)
        del errors
        solved = solve_group(weights, hessian, dict.fromkeys(weights, config), lacking)
    packed = [solution.weight for solution in solved.values()]
    return counted.peak - sum(w.codes.nbytes + w.scales.nbytes + w.zeros.nbytes for w in packed)


def test_allocations_are_counted_by_hand() -> None:
    """Four bytes a number: 10 and 20 beside one another are 120, then 10 of them are freed; views take nothing."""
    given = torch.ones(10)
    with Allocations() as counted:
        first = given * 2
        second = torch.cat([first, first])
        assert counted.now == counted.peak == 120
        view = second.view(2, 10).t()
        first.add_(1)
        given.mul_(2)
        del first
        assert (counted.now, counted.peak) == (80, 120)
        del second
        assert counted.now == 80, "a view of it is alive"
        del view
        assert counted.now == 0


@pytest.mark.usefixtures("solver")
@pytest.mark.parametrize(("columns", "outs"), SMALL)
def test_the_plan_holds_the_solvers_tensors_and_a_reserve(columns: int, outs: tuple[int, ...]) -> None:
    """One layer of many inputs, two of many outputs that share theirs, one between; and no plan is far too careful."""
    measured = allocated(columns, outs, SolverConfig(group_size=32, sweeps=1))
    assert (1 + SOLVER_RESERVE) * measured <= planned_bytes(columns, outs) < 2 * measured


PROCESS = """
import sys, torch
from pathlib import Path
from test_solver_memory import SolverConfig, allocated

def memory(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))

columns, *outs = map(int, sys.argv[1:])
allocated(256, (256,), SolverConfig(sweeps=1))
weights = 2 * columns * sum(outs) + 4 * 256 * columns
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
allocated(columns, outs, SolverConfig(sweeps=1))
print(memory("VmHWM") - before - weights - columns * sum(outs))
"""


@pytest.mark.machine
@pytest.mark.parametrize(("columns", "outs"), LARGE)
def test_the_plan_holds_the_peak_of_a_process(columns: int, outs: tuple[int, ...]) -> None:
    """Workspaces of libraries and freed memory that the C library keeps included."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the system does not tell a process's peak")
    folders = map(str, Path(__file__).resolve().parents[:3])  # this one, that of the helpers, that of the package
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, "-c", PROCESS, str(columns), *map(str, outs)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(run.stdout) < planned_bytes(columns, outs)
