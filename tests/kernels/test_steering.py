"""How many threads passes run in: followed on machines that are made up, and set in one place on this one."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_model import save_tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_cli.main import run
from quasar_core.errors import UsageError
from quasar_core.kernels import threads, times
from quasar_core.kernels.threads import Steering

pytest_plugins = ["helpers.cli_fixtures"]
Machine = Callable[[int, float], tuple[float, float]]  # threads, seconds of work → seconds, share with a core


def shared(cores: int, others: int, barrier: float = 4.0) -> Machine:
    """A machine on which `others` spin: threads without a core each hold one another up at every barrier."""

    def passes(count: int, work: float) -> tuple[float, float]:
        share = min(1.0, cores / (count + others))
        held_up = barrier if count > 1 and share < 1 else 1.0
        return work / count / share * held_up, share

    return passes


def decode(
    steering: Steering, machine: Machine, seconds: float, works: tuple[float, ...] = (0.05,)
) -> tuple[float, float]:
    """Passes for so many seconds → the work that was done, and the seconds."""
    done = spent = 0.0
    index = 0
    while spent < seconds:
        work = works[index % len(works)]
        count = steering.threads_for(work)
        assert 1 <= count <= steering.most
        taken, share = machine(count, work)
        steering.saw(work, count, taken)
        if count == steering.now:
            steering.waited(1 - share, taken)
        done, spent, index = done + work, spent + taken, index + 1
    return done, spent


def best(machine: Machine, most: int) -> float:
    """Work per second with the best fixed number of threads."""
    return max(1 / machine(count, 1.0)[0] for count in range(1, most + 1))


MACHINES = {
    "cores": st.integers(1, 16),
    "others": st.integers(0, 8),
    "barrier": st.floats(1.0, 10.0),
    "work": st.floats(0.002, 0.05),
    "start": st.integers(1, 16),
}


@settings(deadline=None, max_examples=10)
@given(**MACHINES)
def test_it_is_as_fast_as_the_best_number(**drawn: Any) -> None:
    check_speed(**drawn)


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(**MACHINES)
def test_it_is_as_fast_as_the_best_number_on_many_machines(**drawn: Any) -> None:
    check_speed(**drawn)


def check_speed(cores: int, others: int, barrier: float, work: float, start: int) -> None:
    """Never under 0.9 of one thread; 0.9 of the best on two cores, and where no other process is."""
    machine = shared(cores, others, barrier)
    steering = Steering(cores, min(start, cores))
    decode(steering, machine, 40, (work, 2 * work))
    done, spent = decode(steering, machine, 60, (work, 2 * work))
    assert done / spent >= 0.9 / machine(1, 1.0)[0]
    if cores <= 2 or others == 0:
        assert done / spent >= 0.9 * best(machine, cores)


def test_a_quiet_machine_sees_no_trial() -> None:
    steering = Steering(8, 8)
    asked: set[int] = set()
    for _ in range(2000):
        count = steering.threads_for("pass")
        asked.add(count)
        steering.saw("pass", count, 0.01)
        steering.waited(0.01, 0.01)
    assert asked == {8}
    assert steering.changes == 0


def test_it_follows_a_load_that_comes_and_goes() -> None:
    steering = Steering(2, 2)
    decode(steering, shared(2, 0), 5)
    for others, count in ((4, 1), (0, 2), (1, 1), (0, 2)):
        decode(steering, shared(2, others, 8.0), 10)
        assert steering.now == count


def test_a_trial_that_fails_costs_a_twentieth_at_most() -> None:
    machine = shared(2, 4, 8.0)
    steering = Steering(2, 1)
    done, spent = decode(steering, machine, 100)
    assert done / spent >= 0.94 / machine(1, 1.0)[0]


def test_passes_of_other_kinds_are_not_compared() -> None:
    """Passes whose usual time is not known are no part of a trial, however short they are."""
    steering = Steering(2, 1)
    decode(steering, shared(2, 0), 0.2, (0.1,))
    for work in (0.001, 0.002, 0.003, 0.004):
        assert steering.threads_for(work) == 1
        steering.saw(work, 1, work)
    assert steering.threads_for(0.1) == 2
    assert steering.changes == 0


@pytest.fixture
def own() -> Iterator[int]:
    """PyTorch's number, restored with everything remembered of it."""
    before, kept = torch.get_num_threads(), dict(vars(threads._Choice))
    yield before
    torch.set_num_threads(before)
    for name in ("steering", "own", "set"):
        setattr(threads._Choice, name, kept[name])


class Model:
    """Its passes note PyTorch's number."""

    device = torch.device("cpu")

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds = seconds
        self.seen: list[int] = []
        self.now = 0.0

    @threads.steered
    def forward(self, tokens: list[int], cache: object, last_only: bool = False) -> int:
        self.seen.append(torch.get_num_threads())
        if not tokens:
            raise ValueError("nothing to pass")
        self.now += self.seconds[self.seen[-1]]
        return len(tokens)


def test_a_prompt_runs_in_all_threads_whatever_passes_are_steered_to(own: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's products depend on their number, and a text must not depend on what else a machine does."""
    torch.set_num_threads(3)
    monkeypatch.setattr(threads, "free_threads", lambda most, looks=1: 1)
    threads.use_threads("auto")
    model = Model({1: 0.0, 3: 0.0})
    for last_only in (False, True, False):
        model.forward([1, 2], None, last_only=last_only)
    with pytest.raises(ValueError, match="nothing to pass"):
        model.forward([], None, last_only=True)
    model.forward([1], None)
    assert model.seen == [1, 3, 1, 3, 1]


def test_a_fixed_number_is_set_and_kept(own: int) -> None:
    threads.use_threads(3)
    model = Model({3: 0.0})
    assert model.forward([1, 2], None) == 2
    assert model.seen == [3]
    assert threads.describe_threads() == "threads: 3"
    assert times.device_name(model.device).endswith("3 threads")
    threads.use_threads("auto", steer=False)
    assert torch.get_num_threads() == own


def test_passes_wait_for_a_core_in_fewer_threads(own: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that sleeps has no core, as far as a pass can tell."""
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "free_threads", lambda most, looks=1: most)
    threads.use_threads("auto")
    assert threads.describe_threads() == "threads: 2 of 2"
    model = Model({1: 0.01, 2: 0.08})
    clocks = SimpleNamespace(perf_counter=lambda: model.now, thread_time=lambda: 0.0)
    monkeypatch.setattr(threads, "time", clocks)
    for _ in range(30):
        model.forward([1], None, last_only=False)
    assert model.seen[-1] == 1
    assert threads.describe_threads().startswith("threads: 1 of 2, as other processes take cores; changed ")
    assert times.device_name(model.device).endswith("2 threads")  # what is measured is kept for all of them


def test_a_thread_seldom_asks_for_its_own_time(own: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question lets the kernel end its turn: none with one thread, few with several."""
    torch.set_num_threads(2)
    asked: list[float] = []
    for free in (1, 2):
        monkeypatch.setattr(threads, "free_threads", lambda most, looks=1, free=free: free)
        threads.use_threads("auto")
        model = Model({1: 0.0003, 2: 0.0003})

        def thread_time(model: Model = model) -> float:
            asked.append(model.now)
            return model.now

        clocks = SimpleNamespace(perf_counter=lambda model=model: model.now, thread_time=thread_time)
        monkeypatch.setattr(threads, "time", clocks)
        asked.clear()
        for _ in range(1000):
            model.forward([1], None, last_only=False)
        assert len(asked) == (0 if free == 1 else 1 + int(0.3 / threads.LOOK))


def test_a_pass_that_fails_leaves_the_number(own: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "free_threads", lambda most, looks=1: 1)
    threads.use_threads("auto")
    with pytest.raises(ValueError, match="nothing to pass"):
        Model({}).forward([], None)
    assert torch.get_num_threads() == 1
    assert threads.most_threads() == 2


def test_a_program_that_sets_pytorchs_number_is_obeyed(own: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(4)
    monkeypatch.setattr(threads, "free_threads", lambda most, looks=1: 2)
    threads.use_threads("auto")
    model = Model({2: 0.0, 3: 0.0})
    model.forward([1], None)
    torch.set_num_threads(3)
    model.forward([1], None)
    assert model.seen == [2, 3]
    assert threads.describe_threads() == "threads: 3 of 3"


def test_without_use_nothing_is_set(own: int) -> None:
    threads._Choice.steering = None
    torch.set_num_threads(3)
    model = Model({3: 0.0})
    model.forward([1], None)
    assert model.seen == [3]


@pytest.mark.parametrize(("running", "most", "free"), [(0, 4, 4), (2, 4, 2), (8, 4, 1), (None, 4, 4), (2, 2, 2)])
def test_free_threads(running: int | None, most: int, free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_running_elsewhere", lambda: running)
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    assert threads.free_threads(most) == free
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert threads.free_threads(most) == most


@pytest.mark.parametrize("text", ["", "0.1 0.2 0.3", "0.1 0.2 0.3 x/4 5", "0.1 0.2 0.3 7/200 5"])
def test_running_threads_are_read_where_the_system_tells(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of this process, whatever its name, are not others'."""
    file = tmp_path / "loadavg"
    file.write_text(text)
    for number, state in enumerate("RSR"):
        (tmp_path / "task" / str(number)).mkdir(parents=True)
        (tmp_path / "task" / str(number) / "stat").write_text(f"{number} (a) R (b) {state} 1 2")
    (tmp_path / "task" / "ended").mkdir()
    monkeypatch.setattr(threads, "_LOAD", file)
    monkeypatch.setattr(threads, "_OWN_THREADS", tmp_path / "task")
    assert threads._running_elsewhere() == (5 if "7/" in text else None)


def test_more_threads_are_tried_only_where_cores_are_free() -> None:
    """A trial is short, and threads that have just started get more than their share of a busy core."""
    free = 1
    steering = Steering(2, 1, lambda most: free)
    decode(steering, lambda threads, work: (work / threads**2, 1.0), 5)
    assert (steering.now, steering.changes) == (1, 0)
    free = 2
    decode(steering, lambda threads, work: (work / threads**2, 1.0), 5)
    assert (steering.now, steering.changes) == (2, 1)


@pytest.mark.parametrize("number", [0, -1, 1025])
def test_numbers_that_cannot_be(number: int, own: int) -> None:
    with pytest.raises(UsageError, match=rf"--threads must be auto or a number from 1 to \d+ here, not {number}"):
        threads.use_threads(number)


COMMANDS = [
    ["quantize", "demo"],
    ["generate", "--prompt", "abc"],
    ["chat"],
    ["bench", "--dataset", "demo"],
    ["bench", "steps"],
    ["inspect"],
    ["doctor"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.usefixtures("own_home")
def test_every_command_that_computes_takes_threads(
    command: list[str], own: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command, "--threads", "many"]) == 2
    assert "--threads must be auto or a whole number, not many" in " ".join(capsys.readouterr().err.split())
    assert run([*command, "--threads", "0"]) == 2
    assert "--threads must be auto or a number from 1 to " in " ".join(capsys.readouterr().err.split())


def test_generate_computes_in_as_many_threads_and_writes_the_same(
    own: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tiny"
    save_tiny_model(folder, seed=0)
    texts = []
    for number in ("1", "3", "auto"):
        command = ["generate", "-m", str(folder), "--verify", "full", "--prompt", "abcabc", "--raw", "-n", "24"]
        assert run([*command, "--threads", number, "-v"]) == 0
        shown = capsys.readouterr()
        texts.append(shown.out)
        assert f"- threads: {number if number != 'auto' else torch.get_num_threads()}" in shown.err
    assert texts[0] == texts[1] == texts[2]
