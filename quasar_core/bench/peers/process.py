"""Run a peer in a process of its own, ask it, and end it; what it prints goes to a file that tells why it failed."""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import IO, Any

from quasar_core.bench.peers.talk import Ask, Told
from quasar_core.config import Request
from quasar_core.errors import QuasarError
from quasar_core.models.pair import Pair
from quasar_core.openmp import environment_of_others
from quasar_core.records import FinishReason, GenerationResult, Stats, Step

ENDING_SECONDS = 10
_TAIL_BYTES = 8192
_ERROR = re.compile(r"[\d.]+ E (.+)")  # seconds since the start, and a level


class PeerFailure(QuasarError):
    """A peer could not begin or answer; a row tells why."""


class Peer:
    """Answers as `decode.generator.Generator` does, by another program; closing it ends that program."""

    def __init__(self, name: str, pair: Pair, ignore_eos: bool, temperature: float = 0.0) -> None:
        self.name, self.pair, self.temperature = name, pair, temperature
        self.eos_ids = frozenset() if ignore_eos else pair.eos_ids
        self.version = ""

    def ask(self, ask: Ask) -> Told:
        """One answer of the program; PeerFailure where it gives none."""
        raise NotImplementedError

    def close(self) -> None:
        """End the program."""

    def reset(self) -> None:
        """Nothing is kept between answers, but what the program keeps of a prompt by itself."""

    def generate(
        self,
        prompt_ids: Sequence[int],
        on_text: Callable[[str], None] | None = None,
        request: Request | None = None,
    ) -> GenerationResult:
        """One answer; the text comes whole at the end."""
        request = request or Request(256, 0)
        if len(prompt_ids) >= self.pair.max_context:
            raise PeerFailure(
                f"the prompt has {len(prompt_ids)} tokens, and {self.pair.context_words} holds {self.pair.max_context}"
            )
        told = self.ask(Ask(list(prompt_ids), request.max_new_tokens, self.temperature, request.seed))
        text = str(self.pair.tokenizer.decode(told.token_ids, skip_special_tokens=True))
        if on_text:
            on_text(text)
        ended = bool(told.token_ids) and told.token_ids[-1] in self.eos_ids
        reason: FinishReason = "eos" if ended else "length"
        return GenerationResult(list(prompt_ids), told.token_ids, text, reason, stats_of(told, len(prompt_ids)))


def stats_of(told: Told, prompt_tokens: int) -> Stats:
    """A peer's counts. Of a pass it is known that it ran; what all of them drafted together is put to the first."""
    steps = [Step(0, 0)] * told.passes
    if steps and told.drafted:
        steps[0] = Step(told.drafted, told.accepted or 0)
    return Stats(
        new_tokens=len(told.token_ids),
        prompt_tokens=prompt_tokens,
        prefill_tokens=told.prefill_tokens,
        step_log=steps,
        prefill_s=told.prefill_s,
        decode_s=told.decode_s,
        ttft_s=told.prefill_s,
        peak_memory_bytes=told.peak_memory_bytes,
    )


_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG


def _end_with_parent() -> None:
    """Called in the new process: it is ended where the bench is killed, and has no time to."""
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGTERM)


class Child:
    """A program that runs beside this one, with its stderr in a file; it is ended with this object."""

    def __init__(self, command: Sequence[str], with_pipes: bool, variables: dict[str, str] | None = None) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        pipe = subprocess.PIPE if with_pipes else subprocess.DEVNULL
        try:
            self.process = subprocess.Popen(
                command,
                stdin=pipe,
                stdout=pipe if with_pipes else self._log,
                stderr=self._log,
                env={**environment_of_others(), **(variables or {})},
                start_new_session=True,  # what is typed to end the bench ends it by `close`
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        except OSError as error:
            self._log.close()
            raise PeerFailure(f"{command[0]} cannot be run: {error.strerror or error}") from error

    def last_words(self) -> str:
        """The last lines that it marked as errors, as llama.cpp does; else the last line that it printed."""
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - _TAIL_BYTES))
        printed = self._log.read().decode("utf-8", errors="replace").splitlines()
        lines = [" ".join(line.split()) for line in printed if line.strip()] or ["it printed nothing"]
        errors = [found[1] for line in lines if (found := _ERROR.match(line))]
        return "; ".join(errors or lines[-1:])[:300]

    def close(self) -> None:
        """Ask it to end, and end it, with all processes that it began."""
        if self.process.stdin:
            self.process.stdin.close()
        self._end(ask=True)
        with suppress(subprocess.TimeoutExpired):  # what follows does not ask
            self.process.wait(ENDING_SECONDS)
        self._end(ask=False)
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        self._log.close()

    def _end(self, ask: bool) -> None:
        """The process and those that it began, which are a group of their own; on Windows the process alone."""
        if sys.platform == "win32":
            self.process.terminate() if ask else self.process.kill()
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM if ask else signal.SIGKILL)


class TalkingPeer(Peer):
    """A peer whose process speaks as `talk` says."""

    def __init__(
        self,
        name: str,
        pair: Pair,
        ignore_eos: bool,
        command: Sequence[str],
        settings: dict[str, Any],
        variables: dict[str, str] | None = None,
    ) -> None:
        super().__init__(name, pair, ignore_eos)
        self._child = Child([*command, json.dumps(settings)], with_pipes=True, variables=variables)
        try:
            self.version = str(self._hear()["version"])
        except BaseException:
            self._child.close()
            raise

    def ask(self, ask: Ask) -> Told:
        """One answer; PeerFailure where the program refuses, or has ended."""
        try:
            self._pipe("stdin").write((json.dumps(asdict(ask)) + "\n").encode())
            self._pipe("stdin").flush()
        except OSError as error:
            raise PeerFailure(f"it has ended: {self._child.last_words()}") from error
        return Told(**self._hear())

    def close(self) -> None:
        """End the program."""
        self._child.close()

    def _hear(self) -> dict[str, Any]:
        line = self._pipe("stdout").readline()
        if not line:
            raise PeerFailure(f"it has ended: {self._child.last_words()}")
        content: dict[str, Any] = json.loads(line)
        if "error" in content:
            raise PeerFailure(content["error"])
        return content

    def _pipe(self, name: str) -> IO[bytes]:
        pipe: IO[bytes] = getattr(self._child.process, name)
        return pipe
