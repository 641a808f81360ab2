"""Work in the background: in turn, what fails is told, and neither its object nor the program waits for it."""

import gc
import os
import subprocess
import sys
import threading
from concurrent.futures import CancelledError

import pytest

from quasar_core.models.weights.background import PATIENCE, Background

BLOCKED = """
import atexit, threading, time
atexit.register(lambda: print(time.monotonic() - began))  # behind what is registered later
from quasar_core.models.weights.background import Background
backgrounds = [Background("blocked") for _ in range(4)]
for background in backgrounds:
    begun = threading.Event()
    background.submit(lambda: (begun.set(), threading.Event().wait()))
    begun.wait()
began = time.monotonic()
raise SystemExit(7)
"""

IN_PYTORCH = """
import threading
import torch
from quasar_core.models.weights.background import Background
begun, place, other = threading.Event(), torch.zeros(1 << 16), torch.ones(1 << 16)
def work():
    for _ in range(300):
        place.copy_(other)
        begun.set()
background = Background("in PyTorch")
for _ in range(1000):
    background.submit(work)
begun.wait()
raise SystemExit(7)
"""


def test_work_is_done_in_turn_and_failures_are_told() -> None:
    background, done = Background("x"), list[int]()

    def fail() -> None:
        raise OSError(5, "no")

    futures = [background.submit(done.append, 1), background.submit(fail), background.submit(done.append, 2)]
    futures[2].result()
    assert done == [1, 2]
    assert futures[0].exception() is None
    with pytest.raises(OSError, match="no"):
        futures[1].result()


def test_the_thread_ends_with_its_object() -> None:
    background = Background("ends with its object")
    background.submit(int).result()
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "ends with its object")
    del background
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


def test_who_waits_for_work_that_ending_leaves_out_is_told() -> None:
    background, begun, go_on = Background("x"), threading.Event(), threading.Event()
    under_way = background.submit(lambda: begun.set() or go_on.wait(20))
    left_out = background.submit(lambda: 1)
    begun.wait(20)
    background.begin_ending()
    go_on.set()
    with pytest.raises(CancelledError):
        left_out.result(20)
    with pytest.raises(CancelledError):
        background.submit(lambda: 2).result(20)
    assert under_way.result(20)


def test_a_program_ends_within_a_second_although_work_does_not() -> None:
    """However many threads have work under way."""
    ended = subprocess.run([sys.executable, "-c", BLOCKED], timeout=60, check=False, capture_output=True)
    assert ended.returncode == 7
    assert PATIENCE <= float(ended.stdout) < 2 * PATIENCE


FORKED = """
import os, signal, threading
from quasar_core.models.weights.background import Background, Forked
background, begun, go_on = Background("x"), threading.Event(), threading.Event()
under_way = background.submit(lambda: begun.set() or go_on.wait())
waiting = background.submit(lambda: 1)
begun.wait()
child = os.fork()
if child == 0:
    signal.alarm(60)
    assert all(isinstance(future.exception(), Forked) for future in (under_way, waiting))
    assert background.submit(lambda: 2).result() == 2
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
go_on.set()
assert waiting.result() == 1
raise SystemExit(7)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no forks")
def test_a_fork_is_told_what_it_lost_and_works_on() -> None:
    assert subprocess.run([sys.executable, "-c", FORKED], timeout=90, check=False).returncode == 7


@pytest.mark.parametrize("runs", [1, pytest.param(9, marks=pytest.mark.slow)])
def test_a_program_ends_with_work_of_pytorchs_under_way(runs: int) -> None:
    """Python would end the thread in the middle of C++, and with it the program, now and then, by an abort."""
    for _ in range(runs):
        assert subprocess.run([sys.executable, "-c", IN_PYTORCH], timeout=60, check=False).returncode == 7
