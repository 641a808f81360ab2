"""Soak a server of the current pair: many clients, answers that are cut off, bodies that are no requests.

    python -m tools.soak --requests 2000 --clients 16

Starts `quasar serve` in a process of its own, and compares every whole answer with what the library generates. Prints
how many requests of each kind there were, answers that were wrong, and how the server's memory grew, as JSON.
"""

import argparse
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import quasar_core as quasar

PROMPTS = [f"Write a function `{name}` that {what}." for name, what in (
    ("read_lines", "reads a file and returns its lines"), ("count_lines", "counts the lines of a file"),
    ("sum_of", "adds the numbers of a list"), ("largest", "finds the largest of a list"),
    ("reverse", "reverses a text"), ("is_even", "says whether a number is even"),
    ("merge", "merges two sorted lists"), ("first_word", "returns the first word of a text"),
)]  # fmt: skip
LENGTHS = (1, 7, 24, 48)
MALFORMED: list[tuple[bytes, int]] = [
    (b"{", 400),
    (b"[]", 400),
    (b"\xff\xfe", 400),
    (b'{"messages": []}', 400),
    (b'{"messages": [{"role": "user", "content": "a"}], "temperature": "x"}', 400),
    (b'{"messages": [{"role": "user", "content": "a"}], "unknown": 1}', 400),
    (b'{"messages": [{"role": "user", "content": "a"}], "model": "../../etc/passwd"}', 404),
    (b"[" * 5000, 400),
]


@dataclass
class Soak:
    """What the clients did and found."""

    url: str
    expected: dict[tuple[str, int], str]
    left: int
    process: int
    seed: int
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[tuple[int, float]] = field(default_factory=list)  # requests, and MB that the server holds
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> int | None:
        """The number of the next request; None where all are made."""
        with self.lock:
            if self.left == 0:
                return None
            self.left -= 1
            if self.left % 20 == 0:
                self.memory.append((sum(self.done.values()), resident_mb(self.process)))
            return self.left

    def note(self, kind: str, wrong: str | None = None) -> None:
        """Count a request."""
        with self.lock:
            self.done[kind] += 1
            if wrong is not None:
                self.wrong.append(f"{kind}: {wrong}")


def resident_mb(process: int) -> float:
    """Memory of a process, in MB."""
    return int(Path(f"/proc/{process}/statm").read_text("ascii").split()[1]) * 4096 / 1e6


def run_client(soak: Soak) -> None:
    """Ask until all requests are made."""
    with httpx.Client(base_url=soak.url, timeout=300) as http:
        while (number := soak.take()) is not None:
            chance = random.Random(soak.seed * 1_000_003 + number)
            act = chance.choices((ask_whole, ask_stream, leave, send_malformed), (40, 30, 20, 10))[0]
            try:
                act(soak, http, chance)
            except httpx.HTTPError as error:
                soak.note("error", f"{type(error).__name__}: {error}")


def request_of(chance: random.Random) -> tuple[dict[str, Any], tuple[str, int]]:
    """A request, and what its answer is kept under."""
    key = chance.choice(PROMPTS), chance.choice(LENGTHS)
    mode = chance.choice(({}, {}, {"verify": "full"}, {"draft": "none"}))
    return {"messages": [{"role": "user", "content": key[0]}], "max_tokens": key[1], **mode}, key


def ask_whole(soak: Soak, http: httpx.Client, chance: random.Random) -> None:
    """An answer at once."""
    body, key = request_of(chance)
    reply = http.post("/v1/chat/completions", json=body)
    text = reply.json()["choices"][0]["message"]["content"] if reply.status_code == 200 else reply.text
    soak.note("whole", None if text == soak.expected[key] else f"{key}: {text!r}")


def ask_stream(soak: Soak, http: httpx.Client, chance: random.Random) -> None:
    """An answer in chunks."""
    body, key = request_of(chance)
    with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: ")]
    chunks = [json.loads(line) for line in lines[:-1]]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    soak.note("stream", None if text == soak.expected[key] and lines[-1] == "[DONE]" else f"{key}: {text!r}")


def leave(soak: Soak, http: httpx.Client, chance: random.Random) -> None:
    """Go away before the answer, or in the middle of it."""
    body, _ = request_of(chance)
    wanted = chance.randrange(6)
    try:
        with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as reply:
            for number, _ in enumerate(reply.iter_lines()):
                if number >= wanted:
                    break
    finally:
        soak.note("left")


def send_malformed(soak: Soak, http: httpx.Client, chance: random.Random) -> None:
    """A body that is no request, and is refused as such."""
    content, status = chance.choice(MALFORMED)
    reply = http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    told = reply.status_code == status and "error" in reply.json()
    soak.note("malformed", None if told else f"{content[:40]!r}: {reply.status_code}")


def expected_answers(model: str | None) -> dict[tuple[str, int], str]:
    """What the library generates, plainly."""
    pair = quasar.load(model)
    return {
        (prompt, length): quasar.generate(pair, prompt, max_new_tokens=length, verify="full", draft="none").text
        for prompt in PROMPTS
        for length in LENGTHS
    }


def start_server(model: str | None, clients: int, draft: str) -> tuple[subprocess.Popen[str], str]:
    """A server on a free port, and its address."""
    named = [] if model is None else ["--model", model]
    command = [sys.executable, "-m", "quasar_cli", "serve", "--port", "0", "--queue", str(4 * clients)]
    command += ["--draft", draft, *named]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "Serving at " in line:
            url = line.split("Serving at ")[1].split("/v1")[0]
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return process, url
    raise SystemExit("The server did not start.")


def soak_server(
    requests: int, clients: int, seed: int = 0, model: str | None = None, draft: str = "auto"
) -> dict[str, Any]:
    """Run it all; the figures. With `auto`, memory grows until the drafts' own memory of earlier answers is full."""
    expected = expected_answers(model)
    process, url = start_server(model, clients, draft)
    try:
        soak, start = Soak(url, expected, requests, process.pid, seed), time.monotonic()
        threads = [threading.Thread(target=run_client, args=(soak,)) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - start
        metrics = httpx.get(f"{url}/metrics").text.splitlines()
        outcomes = {line.split('"')[1]: float(line.split()[-1]) for line in metrics if "requests_total{" in line}
        alive = httpx.get(f"{url}/health").status_code == 200
    finally:
        process.terminate()
        process.wait()
    return {
        "requests": dict(soak.done),
        "wrong": soak.wrong[:20],
        "wrong_answers": len(soak.wrong),
        "seconds": round(seconds, 1),
        "outcomes": outcomes,
        "alive_at_the_end": alive,
        **slope(soak.memory),
    }


def slope(memory: Sequence[tuple[int, float]]) -> dict[str, float]:
    """How memory grew over the second half of the requests, in MB for each thousand."""
    settled = memory[len(memory) // 2 :]
    counts, sizes = np.array(settled, dtype=float).T
    growth = float(np.polyfit(counts, sizes, 1)[0]) if len(settled) > 2 else 0.0
    return {"mb_at_half": settled[0][1], "mb_at_end": settled[-1][1], "mb_per_1000_requests": round(1000 * growth, 3)}


def main() -> None:
    """Read the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="default: the current pair")
    parser.add_argument("--draft", default="auto")
    options = parser.parse_args()
    found = soak_server(options.requests, options.clients, options.seed, options.model, options.draft)
    print(json.dumps(found, indent=1))
    sys.exit(bool(found["wrong_answers"] or not found["alive_at_the_end"]))


if __name__ == "__main__":
    main()
