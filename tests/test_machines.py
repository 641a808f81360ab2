"""What `make test-machines` runs: names that stand for files, and machines that are told apart."""

import machines
import pytest

FILES = {path.stem.removeprefix("test_") for path in machines.TESTS.rglob("test_*.py")}


@pytest.mark.parametrize("names", ["FILES", "COUNTS", "CLOCKS", "TEXTS", "QUICK"])
def test_names_are_those_of_files(names: str) -> None:
    assert set(getattr(machines, names)) <= FILES


def test_what_a_machine_can_change_runs_and_what_it_cannot_does_not() -> None:
    computing = machines.computing()
    assert {"kernels", "cpu_pass", "decoder", "gptq", "cpu_solver", "solver_memory", "engine_exactness"} <= {*computing}
    assert not {"cuda_pass", "shards", "memory", "live_costs", "grammar", "docs", "bench_run"} & {*computing}
    assert {*machines.QUICK} <= {*computing}


def test_no_machine_stands_twice() -> None:
    given = [(tuple(sorted(machine.variables.items())), machine.under) for machine in machines.MACHINES]
    assert len(set(given)) == len(given)
