"""Run an engine until it is interrupted, and start it anew when one of its processes died."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

from quasar_core.deploy.wish import Command
from quasar_core.openmp import environment_of_others

POLL = 0.5  # seconds
HEALTH_SECONDS = 2
ENDING = 20  # seconds that it has to end when it is asked to


class Supervisor:
    """Keeps one engine running.

    An engine that has answered and then ended by itself is started anew, at most `restarts` times: a killed worker ends
    vLLM's and SGLang's server. One that never answered is not: what was wrong would be so again.
    """

    def __init__(self, command: Command, url: str, say: Callable[[str], None], restarts: int = 10) -> None:
        self._command, self._url, self._say, self._restarts = command, url, say, restarts
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def run(self) -> int:
        """The exit code: 0 where it was asked to end, else the engine's own."""
        previous = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return self._run()
        finally:
            self._end()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _run(self) -> int:
        for restarts_left in range(self._restarts, -1, -1):
            code, answered = self._run_once()
            if self._stopping:
                return 0
            if not answered or not restarts_left:
                return code or 1
            self._say(f"The engine ended by itself (exit code {code}): started anew, {restarts_left - 1} more times.")
        return 1

    def _run_once(self) -> tuple[int, bool]:
        """Run the engine to its end → its exit code, and whether it ever answered."""
        environment = {**environment_of_others(), **self._command.environment}
        self._process = subprocess.Popen(self._command.words, env=environment, start_new_session=True)
        answered = False
        while self._process.poll() is None and not self._stopping:
            if not answered and self._answers():
                answered = True
                self._say(f"Serving at {self._url}/v1 (Ctrl-C ends)")
            time.sleep(POLL)
        code = self._end()
        return code, answered

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/health", timeout=HEALTH_SECONDS) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _stop(self, number: int, frame: FrameType | None) -> Any:
        self._stopping = True

    def _end(self) -> int:
        """End the whole session: workers of an engine that died may have been left behind."""
        process = self._process
        if process is None:
            return 0
        if process.poll() is None:
            _signal_session(process, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(ENDING)
        _signal_session(process)
        return process.wait()


def _signal_session(process: subprocess.Popen[bytes], number: int | None = None) -> None:
    """Signal a process and those that it began, to end them without a number; on Windows end the process alone."""
    if sys.platform == "win32":
        process.kill()
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL if number is None else number)
