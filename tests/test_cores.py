"""Fast and efficient cores, told by folders written by hand."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quasar_core import cores
from quasar_core.kernels import threads


def topology(folder: Path, capacities: dict[int, int], siblings: dict[int, str] | None = None) -> Path:
    """A folder as Linux has it, with each core's capacity, or without."""
    for core, capacity in capacities.items():
        place = folder / f"cpu{core}" / "topology"
        place.mkdir(parents=True)
        (place / "thread_siblings_list").write_text(f"{(siblings or {}).get(core, core)}\n")
        if capacity:
            (place.parent / "cpu_capacity").write_text(f"{capacity}\n")
    return folder


def test_big_and_little_cores_of_arm(tmp_path: Path) -> None:
    folder = topology(tmp_path, {0: 400, 1: 400, 2: 400, 3: 400, 4: 1024, 5: 1024, 6: 1024, 7: 1024})
    assert cores._of_linux(set(range(8)), folder, tmp_path / "none") == 4
    assert cores._of_linux({0, 1, 6}, folder, tmp_path / "none") == 3, "3 × 400 are more than 1 × 1024"
    assert cores._of_linux({0, 5, 6}, folder, tmp_path / "none") == 2
    assert cores._of_linux({0, 1}, folder, tmp_path / "none") is None, "all of one kind"


def test_one_core_that_is_faster_still_does_not_stand_alone(tmp_path: Path) -> None:
    capacities = dict(enumerate([1024, 850, 850, 850, 250, 250, 250, 250]))
    assert cores._of_linux(set(range(8)), topology(tmp_path, capacities), tmp_path / "none") == 4


def test_intels_two_kinds(tmp_path: Path) -> None:
    """Two fast cores of two threads each, four efficient ones; the list decides, not the capacities."""
    pairs = {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}
    folder = topology(tmp_path / "cpu", dict.fromkeys(range(8), 1000), pairs)
    fast = tmp_path / "cpus"
    fast.write_text("0-3\n")
    assert cores._of_linux(set(range(8)), folder, fast) == 2
    assert cores._of_linux({0, 4, 5}, folder, fast) == 1
    assert cores._of_linux({4, 5}, folder, fast) is None, "this process may use no fast one"


def test_cores_of_one_kind_and_systems_that_do_not_tell(tmp_path: Path) -> None:
    assert cores._of_linux({0, 1}, topology(tmp_path / "same", {0: 1024, 1: 1024}), tmp_path / "none") is None
    assert cores._of_linux({0, 1}, topology(tmp_path / "untold", {0: 0, 1: 0}), tmp_path / "none") is None
    assert cores._of_linux({0, 1}, tmp_path / "nothing", tmp_path / "none") is None
    (tmp_path / "odd").write_text("many")
    assert cores._of_linux({0, 1}, tmp_path / "nothing", tmp_path / "odd") is None


@pytest.mark.parametrize(("said", "found"), [("8\n", 8), ("", None), ("what", None), ("0", None)])
def test_macs(said: str, found: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores.sys, "platform", "darwin")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=said))
    assert cores.fast_cores() == found


def test_a_mac_without_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise subprocess.CalledProcessError(1, "sysctl")

    monkeypatch.setattr(cores.sys, "platform", "darwin")
    monkeypatch.setattr(subprocess, "run", fail)
    assert cores.fast_cores() is None


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=12))
def test_no_other_number_shares_the_work_better(capacities: list[int]) -> None:
    falling = sorted(capacities, reverse=True)
    chosen = cores.most_even(capacities)
    assert all(chosen * falling[chosen - 1] >= count * falling[count - 1] for count in range(1, len(falling) + 1))


@given(st.sets(st.integers(0, 300), min_size=1))
def test_lists_are_read_as_they_are_written(numbers: set[int]) -> None:
    assert cores.parse_list(",".join(map(str, sorted(numbers))) + "\n") == numbers
    assert cores.parse_list("0-3,8") == {0, 1, 2, 3, 8}


@pytest.mark.parametrize(
    ("of_pytorch", "variables", "taken"),
    [
        (8, {}, 4),  # every logical core
        (6, {}, 4),  # every physical core
        (5, {}, 5),  # somebody's own number
        (3, {}, 3),  # fewer than there are fast ones
        (8, {"OMP_NUM_THREADS": "8"}, 8),
    ],
)
def test_pytorchs_own_number_leaves_out_efficient_cores(
    of_pytorch: int, variables: dict[str, str], taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(threads, "fast_cores", lambda: 4)
    monkeypatch.setattr(threads, "usable_cores", lambda: set(range(8)))
    monkeypatch.setattr(threads, "physical_cores", lambda cores: 6)
    torch.set_num_threads(of_pytorch)
    threads.use_threads("auto", steer=False)
    assert torch.get_num_threads() == taken
    threads.use_threads(7)
    assert torch.get_num_threads() == 7
