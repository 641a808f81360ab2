"""Run the program that a model wrote against a test, in a process of its own with limits.

The limits keep an accident small: seconds, memory, files, processes, an empty folder, no inherited variables. They are
no sandbox against code that wants to do harm, so a bench runs code only where that is asked for (`--run-code`), and not
where the system sets no limits (Windows).
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec

SECONDS = 10
MEMORY_BYTES = 1 << 30
FILE_BYTES = 1 << 20
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


def why_not() -> str | None:
    """Why programs are not run here."""
    return None if find_spec("resource") else "this system sets no limits on what a program takes"


def passes(prompt: str, text: str, test: str, entry_point: str) -> bool:
    """HumanEval's pass@1 of one answer: whether its program, then `test` and a check of `entry_point`, run through."""
    return runs(f"{program(prompt, text, entry_point)}\n\n{test}\n\ncheck({entry_point})\n")


def program(prompt: str, text: str, entry_point: str) -> str:
    """The program in an answer: its block that defines the function; the prompt continued, where none does."""
    blocks = [block for block in _BLOCK.findall(text) if f"def {entry_point}" in block]
    if blocks:
        return f"{_imports(prompt)}\n{blocks[0]}"
    return f"{_imports(prompt)}\n{text}" if f"def {entry_point}" in text else prompt + text


def _imports(prompt: str) -> str:
    """What a prompt's program imports, which an answer's may take for granted."""
    return "\n".join(line for line in prompt.splitlines() if line.startswith(("import ", "from ")))


def runs(source: str, seconds: int = SECONDS) -> bool:
    """Whether a program ends by itself, in time, with exit code 0; what it has begun ends with it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", source],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                preexec_fn=lambda: _limit(seconds),
                start_new_session=True,
            )
        except (OSError, ValueError):  # ValueError: a null byte in the program
            return False
        try:
            return process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a program, and the processes of its group, which would outlive it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _limit(seconds: int) -> None:
    """Called in the new process before it runs the program; macOS sets no limit on memory."""
    import resource

    wanted = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_CORE: 0,
    }
    if sys.platform != "darwin":
        wanted[resource.RLIMIT_AS] = MEMORY_BYTES
    if hasattr(resource, "RLIMIT_NPROC"):
        wanted[resource.RLIMIT_NPROC] = 64
    for kind, limit in wanted.items():
        _, hard = resource.getrlimit(kind)
        most = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (most, most))
