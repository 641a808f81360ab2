"""Set how many threads compute on the CPU, in this one place: PyTorch's operations and quasar's C++ alike.

PyTorch's own number is the one that holds, and the C++ is called with it. A program that sets PyTorch's number itself
is obeyed. What the C++ computes does not depend on it, to the last bit; PyTorch's products may, as they depend on the
number of tokens. So the pass of a prompt in PyTorch's operations runs in all threads however busy cores are: a text
must not depend on what else the machine does.

`auto` begins with as many threads as there are cores free, and the passes of a model are then steered. Threads wait
for one another at every step of a pass. Where other processes take cores, each step lasts until the last thread has
had its turn, and fewer threads are faster, often several times. So the pass's own thread is watched: where it has to
wait for a core, another number of threads is tried on a few passes, and kept where they take less time than such
passes took before. Where fewer threads than there could be are in use, more are tried from time to time, if the system
has a core for them: threads that have just started get more than their share of busy cores, so that a short trial would
look better than what follows. A trial that fails costs time, and the next one waits until that was at most a twentieth.
"""

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

from quasar_core.config import Auto
from quasar_core.cores import fast_cores, physical_cores
from quasar_core.errors import UsageError
from quasar_core.system import usable_cores

MOST_PER_CORE = 16
_SAMPLES, _APART = 5, 0.002  # looks at the system's load, and seconds between them
_LOAD, _OWN_THREADS = Path("/proc/loadavg"), Path("/proc/self/task")

BUSY = 0.1  # share of a pass in which its thread had no core, above which other processes are there
PAUSE = 0.5  # seconds of passes between two trials, at least
AGAIN = 1.0  # seconds of passes between two looks for a free core: one costs a turn on a busy one
PRICE = 20  # seconds of passes for each second that a failed trial cost
LOOK = 0.05  # seconds of passes between two looks at what their thread had of a core
SETTLED = 0.1  # seconds of passes of one kind, after which their usual time is known; as long is a trial
MEMORY = 1.0  # seconds of passes over which a usual time is averaged
GAIN = 0.93  # of the usual time, below which a trial is kept
HOPELESS = 1.5  # of the usual time, above which it ends early
_FEWEST_PASSES = 3  # of a trial
_DEAR = 0.03  # seconds lost, below which a trial is not ended early

Pass = TypeVar("Pass", bound=Callable[..., Any])


@dataclass
class Usual:
    """The mean time of passes of one kind with the present number of threads."""

    mean: float = 0.0
    passes: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Take in another pass; the last second counts most."""
        self.passes += 1
        self.seconds += seconds
        self.mean += (seconds - self.mean) * max(1 / self.passes, min(1.0, seconds / MEMORY))

    @property
    def is_known(self) -> bool:
        """Whether another time can be compared with it."""
        return self.passes > 1 and self.seconds >= SETTLED


@dataclass
class Trial:
    """Passes with another number of threads: what they took, and what such passes usually take."""

    threads: int
    spent: float = 0.0
    expected: float = 0.0
    passes: int = 0

    def add(self, seconds: float, usual: float) -> None:
        """Take in a pass; the first one, for which threads may have to start, only if it was slower than usual."""
        if self.passes or seconds > usual:
            self.spent += seconds
            self.expected += usual
        self.passes += 1

    @property
    def is_complete(self) -> bool:
        """Whether it has seen enough to be judged."""
        return self.passes > _FEWEST_PASSES and self.expected >= SETTLED

    @property
    def is_hopeless(self) -> bool:
        """Whether going on would only cost more."""
        return self.spent > HOPELESS * self.expected and self.lost > _DEAR

    @property
    def lost(self) -> float:
        """Seconds more than usual."""
        return max(0.0, self.spent - self.expected)

    @property
    def won(self) -> float:
        """Seconds less than usual."""
        return max(0.0, self.expected - self.spent)


class CoreTime:
    """How much of the passes' time their thread had a core.

    Asked seldom: each time a thread asks for its own time, the kernel looks whether its turn is over, and a thread that
    asks at every short pass loses turns to those that do not ask.
    """

    def __init__(self) -> None:
        self._thread, self._start, self._passes = 0, 0.0, 0.0

    def look(self, seconds: float) -> float | None:
        """Take in a pass; now and then, the share of the time since the last look in which it had no core."""
        thread = threading.get_ident()
        if thread != self._thread:
            self._thread, self._start, self._passes = thread, time.thread_time(), 0.0
            return None
        self._passes += seconds
        if self._passes < LOOK:
            return None
        now, passes = time.thread_time(), self._passes
        on_core, self._start, self._passes = now - self._start, now, 0.0
        return 1 - min(on_core / passes, 1.0)


class Steering:
    """Chooses the threads of each pass, from 1 to `most`. Its clock is the time of the passes."""

    def __init__(self, most: int, now: int, free: Callable[[int], int] | None = None) -> None:
        """Begin with `now` threads; `free` says how many of `most` find a core at present."""
        self.most, self.now = most, now
        self.free = free or (lambda most: most)
        self.waiting = 0.0  # the share of recent passes in which their thread had no core
        self.changes = 0
        self._core_time = CoreTime()
        self._usual: dict[Hashable, Usual] = {}
        self._trial: Trial | None = None
        self._clock = self._next_trial = 0.0
        self._turn = 0

    def threads_for(self, kind: Hashable) -> int:
        """The threads of the next pass; passes of one kind take the same time under the same conditions."""
        if kind not in self._usual or not self._usual[kind].is_known:
            return self.now
        if self._trial is None and self._clock >= self._next_trial:
            self._begin_trial()
        return self._trial.threads if self._trial else self.now

    def saw(self, kind: Hashable, threads: int, seconds: float) -> None:
        """Take in the time of a pass."""
        self._clock += seconds
        if self._trial is not None and threads == self._trial.threads:
            self._trial.add(seconds, self._usual[kind].mean)
            self._judge(self._trial)
        elif threads == self.now:
            self._usual.setdefault(kind, Usual()).add(seconds)

    def passed(self, kind: Hashable, threads: int, seconds: float) -> None:
        """Take in a pass of the calling thread, and whether it had a core where that matters: with several threads."""
        self.saw(kind, threads, seconds)
        if threads != self.now or threads == 1:
            self._core_time = CoreTime()
        elif (share := self._core_time.look(seconds)) is not None:
            self.waited(share, LOOK)

    def waited(self, share: float, seconds: float) -> None:
        """Take in the share of some seconds of passes in which their thread had no core."""
        self.waiting += (share - self.waiting) * min(1.0, seconds / SETTLED)

    def candidates(self) -> list[int]:
        """Other numbers to try, one beside the present one and the ends of the range among them.

        Fewer only where other processes take cores, more only where there are cores for them.
        """
        more = {self.now + 1, min(2 * self.now, self.most), self.most} if self.now < self.most else set()
        if more:
            free = self.free(self.most)
            more = {number for number in more if number <= free}
        fewer = {self.now - 1, self.now // 2, 1} if self.now > 1 and self.waiting > BUSY else set()
        return sorted(fewer) + sorted(more, reverse=True)

    def _begin_trial(self) -> None:
        candidates = self.candidates()
        if candidates:
            self._trial = Trial(candidates[self._turn % len(candidates)])
            self._turn += 1
        else:
            self._next_trial = self._clock + (AGAIN if self.now < self.most else SETTLED)

    def _judge(self, trial: Trial) -> None:
        """End a trial that has seen enough: keep its number of threads, or let some time pass before the next."""
        if trial.is_complete and trial.spent < GAIN * trial.expected:
            way_back = PRICE * trial.won if trial.threads < self.now else 0.0  # what trying more again would cost
            self.now, self.changes = trial.threads, self.changes + 1
            self._usual, self.waiting, self._turn = {}, 0.0, 0
            self._trial, self._next_trial = None, self._clock + way_back
        elif trial.is_complete or trial.is_hopeless:
            self._trial, self._next_trial = None, self._clock + max(PAUSE, PRICE * trial.lost)


class _Choice:
    """What was asked for last; before that, PyTorch's own number is left alone."""

    steering: Steering | None = None
    own: int | None = None  # PyTorch's number before it was set here
    set: int | None = None  # the number that was set here


def use_threads(number: int | Auto = "auto", steer: bool = True) -> None:
    """Compute with a fixed number of threads, or with those that PyTorch takes by itself, fewer where cores are busy.

    Without `steer`, for work that must come out the same each time, or that is measured, `auto` is PyTorch's number.
    """
    limit = MOST_PER_CORE * (os.cpu_count() or 1)
    if number != "auto" and not 1 <= number <= limit:
        raise UsageError(f"--threads must be auto or a number from 1 to {limit} here, not {number}.")
    if torch.get_num_threads() != _Choice.set:
        _Choice.own = torch.get_num_threads()
    most = _without_efficient_cores(_Choice.own or 1) if number == "auto" else number
    steers = number == "auto" and steer and most > 1
    _Choice.steering = Steering(most, free_threads(most), lambda most: free_threads(most, looks=1)) if steers else None
    _set(_Choice.steering.now if _Choice.steering else most)


def _without_efficient_cores(number: int) -> int:
    """PyTorch's number of threads, at most one for each fast core; a number that somebody set is kept."""
    if any(os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")):
        return number
    usable = usable_cores()
    if number not in (len(usable), physical_cores(usable)):
        return number
    return min(number, fast_cores() or number)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread for a while: it waits for no other one, however busy the cores are."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(number)


@contextlib.contextmanager
def all_threads() -> Iterator[None]:
    """Compute in the threads that there are when no other process takes cores, whatever passes are steered to."""
    steering = _present_steering()
    if steering is None:
        yield
        return
    _set(steering.most)
    try:
        yield
    finally:
        _set(steering.now)


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
    """Let a model's pass, a method that takes tokens first, run in as many threads as are fastest now.

    With `last_only` it is the pass of a prompt, and runs in all threads.
    """

    @functools.wraps(run)
    def steered_run(model: Any, tokens: Any, *others: Any, **named: Any) -> Any:
        steering = _present_steering()
        if steering is None or model.device.type != "cpu":
            return run(model, tokens, *others, **named)
        if named.get("last_only"):
            with all_threads():
                return run(model, tokens, *others, **named)
        kind = (id(model), run.__name__, len(tokens), others[1:], tuple(named.items()))
        threads = steering.threads_for(kind)
        _set(threads)
        start = time.perf_counter()
        try:
            result = run(model, tokens, *others, **named)
            steering.passed(kind, threads, time.perf_counter() - start)
        finally:
            _set(steering.now)
        return result

    return steered_run  # type: ignore[return-value]


def free_threads(most: int, looks: int = _SAMPLES) -> int:
    """Threads that find a core each beside those of other processes; all where the system does not tell.

    The median of some looks, a little apart.
    """
    cores = os.cpu_count() or most
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < cores:
        return most  # those that run elsewhere cannot be told from those that run here
    found = []
    for look in range(looks):
        if look:
            time.sleep(_APART)
        others = _running_elsewhere()
        if others is None:
            return most
        found.append(others)
    return min(most, max(1, cores - int(median(found))))


def _running_elsewhere() -> int | None:
    """Threads of other processes that run or wait for a core; None where the system does not tell."""
    try:
        running = int(_LOAD.read_text("ascii").split()[3].partition("/")[0])
        own = sum(_runs(thread) for thread in _OWN_THREADS.iterdir())
    except (OSError, ValueError, IndexError):
        return None
    return max(running - own, 0)


def _runs(thread: Path) -> bool:
    """Whether a thread of this process runs or waits for a core; one that has ended since does not."""
    try:
        return (thread / "stat").read_text("ascii", "replace").rpartition(")")[2].split()[0] == "R"
    except (OSError, IndexError):
        return False


def _present_steering() -> Steering | None:
    """None where nothing is steered; a number that a program has set since the last pass is the most from now on."""
    number = torch.get_num_threads()
    if _Choice.steering and number != _Choice.set:
        free = _Choice.steering.free
        _Choice.steering, _Choice.set = Steering(number, number, free), number
    return _Choice.steering


def _set(threads: int) -> None:
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    _Choice.set = threads
