"""Measure what the endpoint costs: tokens a second through it against the library's own, one client, interleaved.

    python -m tools.serve_overhead --rounds 10 --tokens 128

Both answer the same prompts with the same pair in this process, so that costs and windows are the same; the client is a
process of its own (`tools.stream_client`). Prints, as JSON, the two rates (total tokens ÷ total seconds, prompts
included), the overhead, and its two parts: how much longer the engine itself took (`engine_percent`), as whoever else
runs takes cores from it, and the time around it (`around_percent`): HTTP, reading the request, the template, the
chunks. For a quiet machine.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import quasar_core as quasar
from quasar_core.config import GenerationConfig, Request
from quasar_core.decode.generator import Generator
from quasar_core.decode.text import encode_prompt
from quasar_core.serve.run import RunningServer, prefix_positions
from quasar_core.serve.settings import Settings
from tools.soak import PROMPTS


@dataclass
class Answer:
    """One answer: its text and tokens, all its seconds, those of the engine, and the chunks that it came in."""

    text: str
    seconds: float
    engine_s: float
    chunks: int = 1
    tokens: int = 0


def measure(rounds: int, tokens: int, stream: bool, model: str | None, verifier: str | None = None) -> dict[str, float]:
    """The figures; texts that differ end the run."""
    pair = quasar.load(model, verifier)
    settings = prefix_positions(Settings(port=0, prefixes=0, defaults=GenerationConfig(max_new_tokens=tokens)), pair)
    generator = Generator(pair, settings.defaults)
    server = RunningServer(pair, settings)
    server.start()
    command = [sys.executable, "-m", "tools.stream_client", server.url]
    client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    own, through = list[Answer](), list[Answer]()
    ways: list[tuple[list[Answer], Callable[[list[dict[str, str]]], Answer]]] = [
        (own, lambda messages: from_library(generator, messages, tokens)),
        (
            through,
            lambda messages: from_endpoint(client, {"messages": messages, "max_tokens": tokens, "stream": stream}),
        ),
    ]
    for number in range(rounds + 1):
        messages = [{"role": "user", "content": PROMPTS[number % len(PROMPTS)]}]
        for found, answer in ways if number % 2 else reversed(ways):
            found.append(answer(messages))
        if own[-1].text != through[-1].text:
            raise SystemExit(f"The texts differ: {through[-1].text!r} and {own[-1].text!r}.")
    client.communicate()
    server.stop()
    return figures(own[1:], through[1:])  # the first round warms both


def figures(own: list[Answer], through: list[Answer]) -> dict[str, float]:
    """Rates and the overhead, of all answers together."""
    tokens, library, endpoint = (
        sum(answer.tokens for answer in own),
        sum(answer.seconds for answer in own),
        sum(answer.seconds for answer in through),
    )
    engine, engine_before = sum(answer.engine_s for answer in through), sum(answer.engine_s for answer in own)
    return {
        "tokens": tokens,
        "chunks": sum(answer.chunks for answer in through),
        "library_tokens_per_s": round(tokens / library, 2),
        "endpoint_tokens_per_s": round(tokens / endpoint, 2),
        "overhead_percent": round(100 * (endpoint / library - 1), 2),
        "engine_percent": round(100 * (engine - engine_before) / library, 2),
        "around_percent": round(100 * ((endpoint - engine) - (library - engine_before)) / library, 2),
    }


def from_library(generator: Generator, messages: list[dict[str, str]], tokens: int) -> Answer:
    """An answer by `generate`, of a conversation that nothing is kept of."""
    start = time.perf_counter()
    generator.reset()
    result = generator.generate(encode_prompt(generator.pair.tokenizer, messages), request=Request(tokens, 0))
    seconds = time.perf_counter() - start
    stats = result.stats
    return Answer(result.text, seconds, stats.prefill_s + stats.decode_s, tokens=len(result.token_ids))


def from_endpoint(client: subprocess.Popen[str], body: dict[str, Any]) -> Answer:
    """An answer by the client's process."""
    assert client.stdin is not None
    assert client.stdout is not None
    client.stdin.write(json.dumps(body) + "\n")
    client.stdin.flush()
    return Answer(**json.loads(client.stdout.readline()))


def main() -> None:
    """Read the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--no-stream", action="store_true")
    parser.add_argument("--model", help="default: the current pair")
    parser.add_argument("--verifier", help="default: the one that quantize wrote for the model")
    options = parser.parse_args()
    found = measure(options.rounds, options.tokens, not options.no_stream, options.model, options.verifier)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
