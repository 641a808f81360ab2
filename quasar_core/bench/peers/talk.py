"""The protocol between a bench and a peer's process: one JSON object a line, on the process's stdin and stdout.

Only Python's own modules are imported, since a peer may run in another environment, without quasar: the file of such a
peer imports this one as a neighbour.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Ask:
    """One answer to give: the prompt's tokens, the most new ones, how they are drawn."""

    prompt_ids: list[int]
    max_new_tokens: int
    temperature: float
    seed: int


@dataclass
class Told:
    """One answer: its tokens, an end of text included, and what it took.

    `passes` are those behind the prompt's, `prefill_tokens` the tokens that the prompt's pass gave. `drafted` and
    `accepted` are None where the program does not count them.
    """

    token_ids: list[int]
    prefill_s: float
    decode_s: float
    passes: int
    prefill_tokens: int = 1
    drafted: int | None = None
    accepted: int | None = None
    peak_memory_bytes: int = 0


def serve(begin: Callable[[dict[str, Any]], tuple[str, Callable[[Ask], Told]]]) -> None:
    """Be a peer: `begin` loads a model by the settings on the command line, and returns what runs and how it answers.

    Whatever libraries print goes to stderr.
    """
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(content: dict[str, Any]) -> None:
        lines.write(json.dumps(content) + "\n")
        lines.flush()

    try:
        version, answer = begin(json.loads(sys.argv[1]))
    except Exception as error:
        say({"error": one_line(error)})
        raise
    say({"version": version})
    for line in sys.stdin:
        try:
            say(asdict(answer(Ask(**json.loads(line)))))
        except Exception as error:
            say({"error": one_line(error)})


def one_line(error: BaseException) -> str:
    """An error in one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def peak_memory() -> int:
    """The most bytes that this process has held; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
