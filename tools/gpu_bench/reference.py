"""Transformers at the same shape, eager and compiled: what our passes and our plain decoding are held against.

`python -m tools.gpu_bench.reference` prints one JSON row for each measurement as it comes. It is a process of
its own, which the GPU bench can end: compiling a model takes as long as it takes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformers import CompileConfig

from quasar_core.bench.synthetic_models import random_transformers_model
from quasar_core.models.hf.causal_lm import TransformersLM
from tools.gpu_bench.models import Bench, Plan
from tools.gpu_bench.passes import random_tokens, time_pass

PART = "transformers"
LOOK_S = 15.0  # between two lines that say it is still at work
PROMPT, LONGEST = 512, 128
DRY_PROMPT, DRY_LONGEST = 8, 4


def run(bench: Bench) -> None:
    """Add the rows of the other process, for as long as there is time."""
    bench.report.attempt(PART, "reference", partial(run_process, bench))


def run_process(bench: Bench) -> None:
    """Start it, add what it prints, end it when the time is up."""
    process = subprocess.Popen(command(bench.plan), stdout=subprocess.PIPE, text=True)
    output, ended = None, "its time was up"
    while output is None:
        try:
            output, _ = process.communicate(timeout=min(max(bench.report.left(), 1), LOOK_S))
            ended = f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            bench.report.say("transformers is at work")
            if bench.report.left() <= 0:
                process.kill()
                output, _ = process.communicate()
    for line in output.splitlines():
        if line.startswith("{"):
            bench.report.add(PART, **json.loads(line))
    if ended != "exit code 0":
        bench.report.add(PART, what="reference", skipped=ended)


def command(plan: Plan) -> list[str]:
    """This module, run by the same Python."""
    return [sys.executable, "-m", "tools.gpu_bench.reference", *(["--dry-run"] if plan.dry else [])]


def measure(plan: Plan) -> Iterator[dict[str, Any]]:
    """Passes as they are, then plain greedy decoding, eager and compiled."""
    model = random_transformers_model(plan.shape, plan.device, plan.dtype)
    for count in plan.tokens:
        yield {"mode": "eager", "tokens": count, "context": PROMPT, "ms": time_eager(model, count, plan)}
    for mode, options in modes(plan).items():
        yield {"mode": mode, **time_generate(model, options, plan)}


def modes(plan: Plan) -> dict[str, dict[str, Any]]:
    """Ways to call transformers' generate; the static cache is compiled by it."""
    compiling = CompileConfig(backend="eager") if plan.dry else CompileConfig(mode="reduce-overhead")
    return {
        "generate, eager": {},
        "generate, compiled, static cache": {"cache_implementation": "static", "compile_config": compiling},
    }


def time_eager(model: TransformersLM, count: int, plan: Plan) -> float:
    """The median of passes of so many tokens, in ms."""
    context = DRY_PROMPT if plan.dry else PROMPT
    cache = model.new_cache(context + count)
    model.forward(random_tokens(context), cache, last_only=True)
    samples = []
    for _ in range(plan.rounds):
        samples.append(time_pass(partial(model.forward, random_tokens(count), cache), plan.device)[0])
        cache.rollback(context)
    return 1000 * statistics.median(samples)


def time_generate(model: TransformersLM, options: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Tokens per second of greedy decoding, the prompt's pass taken off; of the last answer, as the first compiles."""
    prompt, longest = (DRY_PROMPT, DRY_LONGEST) if plan.dry else (PROMPT, LONGEST)
    ids = torch.tensor([random_tokens(prompt)], device=plan.device)
    seconds = {}
    for new in (longest, 1, longest, 1, longest):
        start = time.perf_counter()
        model.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=new,
            max_new_tokens=new,
            **options,
        )
        if plan.device.type == "cuda":
            torch.cuda.synchronize()
        seconds[new] = time.perf_counter() - start
    return {"tokens_per_s": (longest - 1) / max(seconds[longest] - seconds[1], 1e-9), "prompt": prompt, "new": longest}


def main() -> None:
    """Print a row for each measurement."""
    parser = argparse.ArgumentParser(description="Time transformers at the shape of the GPU bench.")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at a tiny shape")
    options = parser.parse_args()
    plan = Plan.dry_run() if options.dry_run else Plan.full(torch.device("cuda"))
    for row in measure(plan):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
