"""Threads of the C++ that run side by side: each does its part, they wait for one another, and forks have their own."""

import ctypes
import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quasar_core.kernels.cpu import library as compiling

HEADER = Path(compiling.__file__).parent / "team.h"
SOURCE = f"""
#include "{HEADER}"
using namespace quasar;
extern "C" {{
// Each thread writes its step, and after each barrier reads those of all: how many were behind.
int64_t behind(int threads, int steps) {{
    std::vector<std::atomic<int>> at(threads);
    std::atomic<int64_t> found{{0}};
    in_parallel(threads, [&](const Team& team) {{
        for (int step = 1; step <= steps; ++step) {{
            at[team.thread] = step;
            team.barrier();
            for (int i = 0; i < team.threads; ++i) found += at[i] < step;
            team.barrier();
        }}
    }});
    return found;
}}
// How often each thread ran.
void count_runs(int threads, int* runs) {{
    in_parallel(threads, [&](const Team& team) {{ runs[team.thread] += team.threads == threads; }});
}}
void visit_each(int threads, int64_t count, int64_t chunk, int32_t* visits) {{
    for_each(threads, count, chunk, [&](int64_t i) {{ visits[i] += 1; }});
}}
// The halves of the smallest normal number, one of each thread: 0 where denormals are flushed.
void halve(int threads, float* halves) {{
    in_parallel(threads, [&](const Team& team) {{
        volatile float smallest = 1.17549435e-38f;
        halves[team.thread] = smallest * 0.5f;
    }});
}}
}}
"""
FUNCTIONS = {
    "behind": [ctypes.c_int] * 2,
    "count_runs": [ctypes.c_int, ctypes.c_void_p],
    "visit_each": [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p],
    "halve": [ctypes.c_int, ctypes.c_void_p],
}


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """A library of a few functions that run in a team."""
    if compiling.find_compiler() is None:
        pytest.skip("no C++ compiler was found")
    source = tmp_path_factory.mktemp("team") / "team.cpp"
    source.write_text(SOURCE)
    library = compiling.load_library(source, FUNCTIONS)
    library.behind.restype = ctypes.c_int64
    return library


def visits(team: ctypes.CDLL, threads: int, count: int, chunk: int) -> list[int]:
    found = (ctypes.c_int32 * max(count, 1))()
    team.visit_each(threads, count, chunk, found)
    return list(found)[:count]


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_no_thread_passes_a_barrier_before_all_have_come(team: ctypes.CDLL, threads: int) -> None:
    assert team.behind(threads, 50) == 0


def test_each_thread_runs_once_whatever_their_number_was_before(team: ctypes.CDLL) -> None:
    for threads in (2, 5, 1, 3, 5, 2):
        runs = (ctypes.c_int * 5)()
        team.count_runs(threads, runs)
        assert list(runs) == [1] * threads + [0] * (5 - threads)


@given(threads=st.integers(1, 6), count=st.integers(0, 200), chunk=st.integers(1, 40))
def test_each_thing_is_visited_once(team: ctypes.CDLL, threads: int, count: int, chunk: int) -> None:
    assert visits(team, threads, count, chunk) == [1] * count


def test_several_callers_at_once_each_get_their_own(team: ctypes.CDLL) -> None:
    """ctypes lets other Python threads run meanwhile."""
    found: list[bool] = []

    def call() -> None:
        found.extend(visits(team, 3, 100, 7) == [1] * 100 and team.behind(3, 5) == 0 for _ in range(20))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert found == [True] * 80


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_has_threads_of_its_own(team: ctypes.CDLL) -> None:
    """The threads of the process that it was made from are not there."""
    assert team.behind(4, 3) == 0
    child = os.fork()
    if child == 0:
        os._exit(0 if team.behind(4, 3) == 0 and visits(team, 4, 50, 3) == [1] * 50 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_threads_treat_denormals_as_their_caller_does(team: ctypes.CDLL) -> None:
    """Else results would depend on which thread computes them."""
    team.behind(4, 1)  # so that the threads are there before anything changes
    for flush in (True, False, True):
        if not torch.set_flush_denormal(flush):
            pytest.skip("this processor does not flush denormals")
        halves = (ctypes.c_float * 4)()
        team.halve(4, halves)
        assert [half == 0 for half in halves] == [flush] * 4
