"""What the solver takes, measured in a process of its own, against what the plan says of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from quasar_core.quantize.plan import Shape, solver_bytes

SCRIPT = """
import json, sys, torch
from pathlib import Path
from quasar_core.quantize.asymmetric import lacking_outputs
from quasar_core.quantize.gptq import SolverConfig, solve_group

def memory(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))

@torch.inference_mode()
def peak(columns, *outs):
    weights = {str(i): torch.randn(out, columns).bfloat16() for i, out in enumerate(outs)}
    before = memory("VmRSS")
    rows = torch.randn(256, columns)
    hessian = torch.zeros(columns, columns).addmm_(rows.t(), rows, alpha=2 / 256)
    errors = 0.01 * hessian[:outs[0]] if len(outs) == 1 else 0.01 * hessian
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    lacking = lacking_outputs(weights, errors)
    del errors
    solve_group(weights, hessian, dict.fromkeys(weights, SolverConfig(sweeps=1)), lacking)
    return memory("VmHWM") - before

torch.set_num_threads(1)
peak(256, 256)
print(json.dumps(peak(*map(int, sys.argv[1:]))))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell a process's peak")
@pytest.mark.parametrize(("columns", "outs"), [(4096, (64,)), (1024, (8192, 8192))])
def test_the_plan_holds_the_solver_s_peak(columns: int, outs: tuple[int, ...]) -> None:
    """One layer of many inputs, and two of many outputs that share theirs."""
    command = [sys.executable, "-c", SCRIPT, str(columns), *map(str, outs)]
    measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    measured -= columns * sum(outs)  # codes, which the plan counts with the block
    shape = Shape({f"model.layers.0.mlp.{i}": (out, columns) for i, out in enumerate(outs)}, 0, 0, columns, 1)
    planned = solver_bytes(shape, on_device=False)
    assert measured < planned < 1.6 * measured
