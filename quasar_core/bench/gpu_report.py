"""What a GPU bench found: rows of each part, written as they come; and the time that is left.

Every row is printed with the seconds since the start, so that a run that is cut off has told what it knew.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quasar_core.bench.environment import git_hash, package_versions
from quasar_core.checkpoint.writer import write_json

Row = dict[str, Any]


class Report:
    """Rows by part, in one JSON file; `failed` once a row holds an error or a wrong result."""

    def __init__(self, folder: Path, facts: Row, seconds: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "gpu-bench.json"
        self.facts = {**facts, "versions": package_versions(), "git": git_hash()}
        self.parts: dict[str, list[Row]] = {}
        self.failed = False
        self._start = time.perf_counter()
        self._seconds = self._until = seconds

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

    def progress(self, stage: str, done: int, total: int) -> None:
        """A `records.Progress`: how far something has come, as a line."""
        self.say(f"{stage}: {done} of {total}")

    def add(self, part: str, **row: Any) -> None:
        """A row, in the file before the next one is measured."""
        self.parts.setdefault(part, []).append(row)
        self.failed |= "error" in row or row.get("ok") is False
        self.say(f"{part}: " + ", ".join(f"{key} {_short(value)}" for key, value in row.items()))
        self.write()

    def write(self) -> None:
        """The file, whole or not at all."""
        write_json(self.path, {**self.facts, "seconds": self.elapsed, "failed": self.failed, "parts": self.parts})

    def attempt(self, part: str, what: str, measure: Callable[[], None]) -> None:
        """Measure something: what fails is a row, and the bench goes on; so is what no time is left for."""
        if self.left() <= 0:
            self.add(part, what=what, skipped="no time was left")
            return
        try:
            measure()
        except Exception as error:
            self.add(part, what=what, error=f"{type(error).__name__}: {error}")
            if isinstance(error, torch.cuda.OutOfMemoryError):
                torch.cuda.empty_cache()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
