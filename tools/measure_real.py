"""Measure a real model beside other programs, and write the result files and pages of docs/results.

    python -m tools.measure_real MODEL VERIFIER OUT --data FOLDER [--llama-server FILE] [--gguf FILE] [--quick]

`MODEL` and `VERIFIER` are folders, `--data` holds spec_bench/question.jsonl. On a quiet machine, by one command: greedy
and sampled answers of every arm on Spec-Bench's kinds of task, 13 questions of each, then a page and the tables.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ARMS = ["vanilla", "full", "quantized", "exact", "quantized-only", "transformers"]
QUESTIONS, QUICK_QUESTIONS = 78, 12  # 13 of each of the six kinds
TOKENS, QUICK_TOKENS = 96, 24


def main() -> int:
    """Run the bench, then what reads its result file; the exit code of the first that fails."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / f"{options.model.name}.json"
    environment = {**os.environ, "QUASAR_DATA": str(options.data)}
    for command in commands(options, results):
        print("quasar", *command, flush=True)
        done = subprocess.run([sys.executable, "-m", "quasar_cli", *command], env=environment)
        if done.returncode:
            return done.returncode
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in ("model", "verifier", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--llama-server")
    parser.add_argument("--gguf")
    parser.add_argument("--quick", action="store_true", help="a few questions, to see that it runs")
    return parser.parse_args()


def commands(options: argparse.Namespace, results: Path) -> list[list[str]]:
    """The bench; its tables computed a second way; the page; the tables as Markdown."""
    arms, peers = list(ARMS), list[str]()
    if options.gguf or options.llama_server:
        arms += ["llama.cpp", "llama.cpp-spec"]
        peers += ["--llama-server", options.llama_server] if options.llama_server else []
        peers += ["--gguf", options.gguf] if options.gguf else []
    bench = ["bench", "--model", str(options.model), "--verifier", str(options.verifier), "--dataset", "spec-bench"]
    bench += ["--limit", str(QUICK_QUESTIONS if options.quick else QUESTIONS), "--temperature", "0,1"]
    bench += ["--max-new-tokens", str(QUICK_TOKENS if options.quick else TOKENS), "--arms", ",".join(arms)]
    return [
        [*bench, *peers, "--output", str(results)],
        ["bench", "show", str(results), "--recompute", "--markdown", "--details"],
        ["bench", "report", str(results), "--output", str(results.with_suffix(".html"))],
    ]


if __name__ == "__main__":
    sys.exit(main())
