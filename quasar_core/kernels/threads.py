"""The one place that sets how many threads compute on the CPU: PyTorch's operations and quasar's C++ alike.

PyTorch's own number is the one that holds, and the C++ is called with it. `auto` begins with as many threads as there
are cores free, and passes of a model are then steered (`steering.py`). A program that sets PyTorch's number itself is
obeyed. What the C++ computes does not depend on it, to the last bit; PyTorch's products may, as they depend on the
number of tokens.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

from quasar_core.config import Auto
from quasar_core.errors import UsageError
from quasar_core.kernels.steering import Steering

MOST = 1024
_SAMPLES, _APART = 5, 0.002  # looks at the system's load, and seconds between them
_LOAD = Path("/proc/loadavg")

Pass = TypeVar("Pass", bound=Callable[..., Any])


class _Choice:
    """What was asked for last; before that, PyTorch's own number is left alone."""

    steering: Steering | None = None
    own: int | None = None  # PyTorch's number before it was set here
    set: int | None = None  # the number that was set here


def use_threads(number: int | Auto = "auto", steer: bool = True) -> None:
    """Compute with a fixed number of threads, or with those that PyTorch takes by itself, fewer where cores are busy.

    Without `steer`, for work that must come out the same each time, or that is measured, `auto` is PyTorch's number.
    """
    if number != "auto" and not 1 <= number <= MOST:
        raise UsageError(f"--threads must be auto or a number from 1 to {MOST}, not {number}.")
    if torch.get_num_threads() != _Choice.set:
        _Choice.own = torch.get_num_threads()
    most = _Choice.own or 1 if number == "auto" else number
    _Choice.steering = Steering(most, free_threads(most)) if number == "auto" and steer and most > 1 else None
    _set(_Choice.steering.now if _Choice.steering else most)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread for a while: it waits for no other one, however busy the cores are."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(number)


def most_threads() -> int:
    """The threads that there are for computing when no other process takes cores."""
    steering = _Choice.steering
    return steering.most if steering and _Choice.set == torch.get_num_threads() else torch.get_num_threads()


def describe_threads() -> str:
    """How many threads compute, and why, as a sentence for `-v`."""
    steering = _Choice.steering
    if steering is None:
        return f"threads: {torch.get_num_threads()}"
    why = ", as other processes take cores" if steering.now < steering.most else ""
    times = f"; changed {steering.changes} times while running" if steering.changes else ""
    return f"threads: {steering.now} of {steering.most}{why}{times}"


def steered(run: Pass) -> Pass:
    """Let a model's pass, a method that takes tokens first, run in as many threads as are fastest now."""

    @functools.wraps(run)
    def steered_run(model: Any, tokens: Any, *others: Any, **named: Any) -> Any:
        steering = _present_steering()
        if steering is None or model.device.type != "cpu":
            return run(model, tokens, *others, **named)
        kind = (id(model), run.__name__, len(tokens), others[1:], tuple(named.items()))
        threads = steering.threads_for(kind)
        _set(threads)
        start, core_start = time.perf_counter(), time.thread_time()
        try:
            result = run(model, tokens, *others, **named)
            on_core = time.thread_time() - core_start
            steering.saw(kind, threads, time.perf_counter() - start, on_core)
        finally:
            _set(steering.now)
        return result

    return steered_run  # type: ignore[return-value]


def free_threads(most: int) -> int:
    """Threads that find a core each, by how many other threads of the system run now; all where that is not known."""
    cores = os.cpu_count() or most
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < cores:
        return most  # those that run elsewhere cannot be told from those that run here
    looks = []
    for _ in range(_SAMPLES):
        running = _running_threads()
        if running is None:
            return most
        looks.append(running - 1)  # this one
        time.sleep(_APART)
    return min(most, max(1, cores - int(median(looks))))


def _running_threads() -> int | None:
    """Threads of all processes that run or wait for a core; None where the system does not tell."""
    try:
        return int(_LOAD.read_text("ascii").split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):
        return None


def _present_steering() -> Steering | None:
    """None where nothing is steered; a number that a program has set since the last pass is the most from now on."""
    number = torch.get_num_threads()
    if _Choice.steering and number != _Choice.set:
        _Choice.steering, _Choice.set = Steering(number, number), number
    return _Choice.steering


def _set(threads: int) -> None:
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    _Choice.set = threads
