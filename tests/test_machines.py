"""What `make test-machines` and `make sanitize` run: names that stand for files, and machines that are told apart."""

import machines
import pytest
import sanitized

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


def test_all_that_runs_the_cpp_is_sanitized() -> None:
    passes, loops = ({*sanitized.naming(words)} for words in (sanitized.PASSES, sanitized.SOLVER))
    named = {path.rpartition("test_")[2] for path in passes if path.startswith("tests/models/")}
    assert named >= {"cpu_pass.py", "mixtures.py", "mtp.py", "recurrent.py", "trees.py"}
    assert loops == {"tests/quantize/test_cpu_solver.py", "tests/quantize/test_products.py"}
    assert all((machines.TESTS / "kernels" / name).exists() for name in sanitized.BUILDING)
