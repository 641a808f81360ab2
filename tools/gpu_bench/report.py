"""What a GPU bench found: rows of each part, written as they come; and the time that is left.

Every row is printed with the seconds since the start, so that a run that is cut off has told what it knew. The file
also says what has been attempted: where a kernel takes the device or the process with it, another process goes on
behind that attempt.
"""

import faulthandler
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quasar_core.files import read_json_if_there, write_json
from quasar_core.kernels.gpu import is_lost
from quasar_core.system import git_hash, package_versions
from tools.gpu_bench.ladder import LAST, describe

Row = dict[str, Any]
Attempt = list[str]  # a part, and what of it
FILE = "gpu-bench.json"
LADDERED = ("headline", "end to end")  # parts whose failures are tried again with less
QUIET_S = float(os.environ.get("QUASAR_BENCH_QUIET_S", "60"))  # seconds without a line
NO_TIME = "no time was left"
LONGEST_ERROR = 2000  # characters of a row


class DeviceLostError(Exception):
    """After an illegal access and its like no further call of this process reaches the device."""


class Report:
    """Rows by part, in one JSON file; `failed` once a row holds an error or a wrong result.

    With `earlier`, the content of the file of a process that ended before its time, it goes on where that one was.
    """

    def __init__(
        self,
        folder: Path,
        facts: Row,
        seconds: float,
        elapsed: float = 0.0,
        earlier: Row | None = None,
        rung: int = LAST,
        watches: bool = False,
    ) -> None:
        """`rung` is the ladder's: below the last, what ended a process or failed is tried again at the next one."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        self.facts = {**facts, "versions": package_versions(), "git": git_hash()}
        earlier = earlier or {}
        self.parts: dict[str, list[Row]] = earlier.get("parts", {})
        self.failed: bool = earlier.get("failed", False)
        self._done: list[Attempt] = earlier.get("done", [])
        self._begun: list[Attempt] = []  # each within the one before it
        self.rung, self._watches = rung, watches
        self._ended: list[str] = earlier.get("ended", [])
        self._start = time.perf_counter() - elapsed
        self._seconds = self._until = seconds
        if earlier.get("begun") and not earlier["device_lost"]:  # a lost device has its row
            part, what = earlier["begun"][-1]
            if earlier["rung"] == LAST:
                self._done.append([part, what])
            self.add(part, what=what, error="the process ended here, or hung", left_out=describe(earlier["rung"]))

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def begin(self, share: float) -> None:
        """The next part may last until this share of the whole time is over; what earlier parts saved is its gain."""
        self._until = share * self._seconds

    def left(self) -> float:
        """Seconds that are left of the part."""
        return self._until - self.elapsed

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"[{self.elapsed:6.1f} s] {text}", flush=True)
        if self._watches:  # a process that says nothing for so long hangs, and is ended from outside Python
            faulthandler.dump_traceback_later(QUIET_S, exit=True)

    def progress(self, stage: str, done: int, total: int) -> None:
        """A `records.Progress`: how far something has come, as a line."""
        self.say(f"{stage}: {done} of {total}")

    def add(self, part: str, **row: Any) -> None:
        """A row, in the file before the next one is measured."""
        self.parts.setdefault(part, []).append(row)
        self.failed |= "error" in row or row.get("ok") is False
        self.say(f"{part}: " + ", ".join(f"{key} {_short(value)}" for key, value in row.items()))
        self.write()

    def write(self, *, finished: bool = False, device_lost: bool = False) -> None:
        """The file, whole or not at all."""
        state = {"done": self._done, "begun": self._begun, "finished": finished, "device_lost": device_lost}
        state |= {"rung": self.rung, "ended": self._ended}
        found = {"seconds": self.elapsed, "failed": self.failed, "parts": self.parts}
        write_json(self.path, {**self.facts, **found, **state})

    def end(self, part: str) -> None:
        """A part is over, whatever came of it."""
        self._ended.append(part)
        self.write()

    def attempt(self, part: str, what: str, measure: Callable[[], None]) -> None:
        """Measure something: what fails is a row, and the bench goes on; so is what no time is left for.

        What an earlier process attempted is left out. DeviceLostError where nothing more can be measured in this one.
        """
        key = [part, what]
        if key in self._done:
            return
        if self.left() <= 0:
            self.add(part, what=what, skipped=NO_TIME)
            return
        self._begun.append(key)
        self.write()
        self.say(f"{part}: {what}")
        lost = False
        try:
            measure()
        except DeviceLostError:
            raise
        except Exception as error:
            self.add(part, what=what, error=f"{type(error).__name__}: {error}"[:LONGEST_ERROR])
            if isinstance(error, torch.cuda.OutOfMemoryError):
                torch.cuda.empty_cache()
            lost = is_lost()
            if part in LADDERED and self.rung < LAST:
                self._begun.pop()
                self.write(device_lost=True)
                raise DeviceLostError(f"{part}: {what}") from error
        self._begun.pop()
        self._done.append(key)
        if lost:
            self.write(device_lost=True)
            raise DeviceLostError(f"{part}: {what}")


def read_report(folder: Path) -> Row | None:
    """What a run wrote into a folder; None where there is nothing."""
    path = folder / FILE
    content: Row | None = read_json_if_there(path)
    return content


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
