"""How many threads run a pass fastest, found by the times of the passes themselves while they run.

Threads wait for one another at every step of a pass. Where other processes take cores, each step lasts until the last
thread has had its turn, and fewer threads are faster, often several times. So the pass's own thread is watched: where
it has to wait for a core, another number of threads is tried on a few passes, and kept where they take less time than
such passes took before. Where fewer threads than there could be are in use, more are tried from time to time. A trial
that fails costs time, and the next one waits until that was at most a twentieth.
"""

from collections.abc import Hashable
from dataclasses import dataclass

BUSY = 0.1  # share of a pass in which its thread had no core, above which other processes are there
PAUSE = 0.5  # seconds of passes between two trials, at least
PRICE = 20  # seconds of passes for each second that a failed trial cost
SETTLED = 0.1  # seconds of passes of one kind, after which their usual time is known; as long is a trial
MEMORY = 1.0  # seconds of passes over which a usual time is averaged
GAIN = 0.93  # of the usual time, below which a trial is kept
HOPELESS = 1.5  # of the usual time, above which it ends early
_FEWEST_PASSES = 3  # of a trial
_DEAR = 0.03  # seconds lost, below which a trial is not ended early


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


class Steering:
    """Chooses the threads of each pass, from 1 to `most`. Its clock is the time of the passes."""

    def __init__(self, most: int, now: int) -> None:
        self.most, self.now = most, now
        self.waiting = 0.0  # the share of recent passes in which their thread had no core
        self.changes = 0
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

    def saw(self, kind: Hashable, threads: int, seconds: float, on_core: float) -> None:
        """Take in a pass: its time, and how much of that its thread had a core."""
        self._clock += seconds
        if self._trial is not None and threads == self._trial.threads:
            self._trial.add(seconds, self._usual[kind].mean)
            self._judge(self._trial)
        elif threads == self.now:
            self._usual.setdefault(kind, Usual()).add(seconds)
            share = 1 - min(on_core / seconds, 1.0) if seconds else 0.0
            self.waiting += (share - self.waiting) * min(1.0, seconds / SETTLED)

    def candidates(self) -> list[int]:
        """Other numbers to try, one beside the present one and the ends of the range among them.

        Fewer only where other processes take cores.
        """
        more = {self.now + 1, min(2 * self.now, self.most), self.most} if self.now < self.most else set()
        fewer = {self.now - 1, self.now // 2, 1} if self.now > 1 and self.waiting > BUSY else set()
        return sorted(fewer) + sorted(more, reverse=True)

    def _begin_trial(self) -> None:
        candidates = self.candidates()
        if candidates:
            self._trial = Trial(candidates[self._turn % len(candidates)])
            self._turn += 1
        else:
            self._next_trial = self._clock + SETTLED

    def _judge(self, trial: Trial) -> None:
        """End a trial that has seen enough: keep its number of threads, or let some time pass before the next."""
        if trial.is_complete and trial.spent < GAIN * trial.expected:
            way_back = PRICE * trial.won if trial.threads < self.now else 0.0  # what trying more again would cost
            self.now, self.changes = trial.threads, self.changes + 1
            self._usual, self.waiting, self._turn = {}, 0.0, 0
            self._trial, self._next_trial = None, self._clock + way_back
        elif trial.is_complete or trial.is_hopeless:
            self._trial, self._next_trial = None, self._clock + max(PAUSE, PRICE * trial.lost)
