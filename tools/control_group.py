"""Run a process in a control group with a memory limit, where the kernel counts all that it takes, pages of files too.

Version 1 and 2 of Linux's control groups, made below the root: it takes the rights of root, or a group that was handed
over. `anonymous` is what no file can bring back, sampled: the kernel keeps its highest value of the sum alone.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
SAMPLED, PATIENCE = 0.02, 10.0  # seconds between samples, and until an emptied group must be gone
PEAK, LIMIT = ("memory.peak", "memory.max_usage_in_bytes"), ("memory.max", "memory.limit_in_bytes")
ANONYMOUS = ("anon", "total_rss")  # lines of memory.stat, of version 2 and 1
MET_LIMIT = ("memory.failcnt",)  # of version 1; version 2 has a line of memory.events


@dataclass(frozen=True)
class Counted:
    """Bytes at most: of all that was charged to a group, and of what no file holds; how often it met its limit."""

    peak: int
    anonymous: int
    met_limit: int


@dataclass(frozen=True)
class ControlGroup:
    """A group's folder."""

    folder: Path

    def run(self, command: Sequence[str], seconds: float) -> tuple["subprocess.CompletedProcess[str]", Counted]:
        """Run a command in it to its end; TimeoutExpired, and no process of it left, after so many seconds."""
        highest, ended = [0], threading.Event()

        def sample() -> None:
            while not ended.wait(SAMPLED):
                highest[0] = max(highest[0], self.anonymous())

        watcher = threading.Thread(target=sample)
        watcher.start()
        try:
            done = subprocess.run(command, capture_output=True, text=True, preexec_fn=self._join, timeout=seconds)
        finally:
            ended.set()
            watcher.join()
        return done, Counted(self._number(PEAK), highest[0], self.met_limit())

    def anonymous(self) -> int:
        """Bytes that are in no file, now."""
        return _line((self.folder / "memory.stat").read_text(), ANONYMOUS)

    def met_limit(self) -> int:
        """How often more was asked for than the limit left, so that pages of files had to go first."""
        events = self.folder / "memory.events"
        return _line(events.read_text(), ("max",)) if events.is_file() else self._number(MET_LIMIT)

    def limit(self, size: int) -> None:
        """Set the most bytes; OSError where that is not allowed."""
        _existing(self.folder, LIMIT).write_text(str(size))

    def remove(self) -> None:
        """Kill what is left in it, all of it started here, and remove it; OSError where that cannot be done."""
        until = time.monotonic() + PATIENCE
        while True:
            for process in (self.folder / "cgroup.procs").read_text().split():
                os.kill(int(process), signal.SIGKILL)
            try:
                self.folder.rmdir()
                return
            except OSError:  # a killed process leaves it a moment later
                if time.monotonic() > until:
                    raise
            time.sleep(SAMPLED)

    def _join(self) -> None:
        """Runs in the new process: it enters the group before it is another program."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def _number(self, names: Sequence[str]) -> int:
        return int(_existing(self.folder, names).read_text())


@contextmanager
def control_group(limit: int | None) -> Iterator[ControlGroup | None]:
    """A new group, with this limit or none; None where the machine does not let us make one that counts memory."""
    top = GROUPS / "memory" if (GROUPS / "memory").is_dir() else GROUPS
    group = ControlGroup(top / f"quasar-{os.getpid()}")
    try:
        group.folder.mkdir()
    except OSError:
        yield None
        return
    try:
        if any((group.folder / name).is_file() for name in PEAK):
            if limit is not None:
                group.limit(limit)
            yield group
        else:  # version 2 without the memory controller, or a kernel before 5.19
            yield None
    finally:
        group.remove()


def _existing(folder: Path, names: Sequence[str]) -> Path:
    return next(folder / name for name in names if (folder / name).is_file())


def _line(text: str, names: Sequence[str]) -> int:
    """The number of the first line of these names."""
    found = dict(line.split() for line in text.splitlines())
    return next(int(found[name]) for name in names if name in found)
