"""Measure what the endpoint costs: tokens a second through it against the library's own, one client, interleaved.

    python -m tools.serve_overhead --rounds 10 --tokens 128

Both answer the same prompts with the same pair in this process, so that costs and windows are the same. Prints the two
rates (total tokens ÷ total seconds, prompts included) and the overhead, as JSON. For a quiet machine.
"""

import argparse
import json
import time
from dataclasses import replace

import httpx

import quasar_core as quasar
from quasar_core.config import GenerationConfig, Request
from quasar_core.decode.generator import Generator
from quasar_core.decode.text import encode_prompt
from quasar_core.serve.run import RunningServer, prefix_positions
from quasar_core.serve.settings import Settings
from tools.soak import PROMPTS


def measure(rounds: int, tokens: int, stream: bool, model: str | None, verifier: str | None = None) -> dict[str, float]:
    """Seconds of both ways; texts that differ end the run."""
    pair = quasar.load(model, verifier)
    settings = prefix_positions(Settings(port=0, prefixes=0, defaults=GenerationConfig(max_new_tokens=tokens)), pair)
    generator = Generator(pair, replace(settings.defaults, ignore_eos=False))
    server = RunningServer(pair, settings)
    server.start()
    library = endpoint = 0.0
    written = 0
    with httpx.Client(base_url=server.url, timeout=600) as http:
        for number in range(rounds + 1):
            messages = [{"role": "user", "content": PROMPTS[number % len(PROMPTS)]}]
            start = time.perf_counter()
            generator.reset()
            result = generator.generate(encode_prompt(pair.tokenizer, messages), request=Request(tokens, 0))
            own = time.perf_counter() - start
            body = {"messages": messages, "max_tokens": tokens, "stream": stream}
            start = time.perf_counter()
            text = read(http, body)
            through = time.perf_counter() - start
            if text != result.text:
                raise SystemExit(f"The texts differ: {text!r} and {result.text!r}.")
            if number:  # the first round warms both
                library, endpoint, written = library + own, endpoint + through, written + len(result.token_ids)
    server.stop()
    return {
        "tokens": written,
        "library_tokens_per_s": round(written / library, 2),
        "endpoint_tokens_per_s": round(written / endpoint, 2),
        "overhead_percent": round(100 * (endpoint / library - 1), 2),
    }


def read(http: httpx.Client, body: dict) -> str:
    """An answer's text."""
    if not body["stream"]:
        return str(http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"])
    with http.stream("POST", "/v1/chat/completions", json=body) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: ")]
    return "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1])


def main() -> None:
    """Read the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--no-stream", action="store_true")
    parser.add_argument("--model", help="default: the current pair")
    parser.add_argument("--verifier", help="default: the one that quantize wrote for the model")
    options = parser.parse_args()
    figures = measure(options.rounds, options.tokens, not options.no_stream, options.model, options.verifier)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
