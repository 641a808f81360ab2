"""Every instruction set that this machine can run, on one model: milliseconds of short passes, and times their floor.

    python -m tools.measure_forms MODEL VERIFIER [--tokens 1,2,4,8,16] [--context 256] [--rounds 9] [--threads 2]
        [--compress] [--llama-bench FILE --gguf FILE …]

The passes of target and verifier run in each form in turn, interleaved, on the same weights; medians. The floor is the
bytes that a pass reads over the measured bandwidth. llama.cpp's passes (its prompts of so many tokens, which compute
one row of logits) are timed before and after, and the faster of both counts; give its build for the same instruction
set.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from quasar_core.api import decoding
from quasar_core.bench.steps import Candidate, Candidates, StepConfig, StepReport, lean_candidate, measure_steps
from quasar_core.kernels.cpu.forms import VARIABLE, usable
from quasar_core.models import loading
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.pair import Pair

Milliseconds = dict[int, float]  # by rows


def in_each_form(pair: Pair) -> Iterator[tuple[str, Candidate]]:
    """Target and verifier with a pass of each form; they share their weights."""
    for form in usable():
        os.environ[VARIABLE] = form.name
        for role, model in (("target", pair.target), ("verifier", pair.verifier)):
            if not isinstance(model, LeanDecoder):
                sys.exit(f"{pair.target_name} does not run on our own decoder.")
            own = copy.copy(model)
            own.fast, note = loading.choose(own)
            if own.fast is None:
                sys.exit(f"{role} in {form.name}: {note}")
            yield f"{role}, {form.name}", lean_candidate(own)
    del os.environ[VARIABLE]


def llama_passes(program: str, model: Path, tokens: tuple[int, ...], rounds: int) -> Milliseconds:
    """Median milliseconds of llama.cpp's passes over so many tokens."""
    command = [program, "-m", str(model), "-n", "0", "-p", ",".join(map(str, tokens)), "-r", str(rounds), "-o", "json"]
    command += ["-t", str(torch.get_num_threads())]
    rows = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return {row["n_prompt"]: sorted(row["samples_ns"])[len(row["samples_ns"]) // 2] / 1e6 for row in rows}


def print_report(report: StepReport, others: dict[str, Milliseconds]) -> None:
    """A row for each model in each form: milliseconds and times the floor, by rows of a pass."""
    tokens = report.config.tokens
    low, high = sorted(report.bandwidth)
    print(
        f"{report.name} in {report.dtype}, {report.device}, {low / 1e9:.1f} to {high / 1e9:.1f} GB/s read; ms (× floor)"
    )
    print(f"| pass | {' | '.join(map(str, tokens))} |\n|---|{'---|' * len(tokens)}")
    for name in dict.fromkeys(row.model for row in report.rows):
        rows = {row.tokens: row for row in report.rows if row.model == name}
        print(f"| {name} | {' | '.join(f'{rows[t].ms:.2f} ({rows[t].ratio:.2f})' for t in tokens)} |")
    for name, found in others.items():
        print(f"| {name} | {' | '.join(f'{found[t]:.2f}' for t in tokens)} |")
    if report.others is not None:
        print(f"Other programs took {100 * report.others:.0f} % of the cores.")


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in ("model", "verifier"):
        parser.add_argument(name)
    parser.add_argument("--tokens", default="1,2,4,8,16")
    parser.add_argument("--llama-bench")
    parser.add_argument("--compress", action="store_true", help="the target's weights in 12 bits, in every form")
    parser.add_argument("--gguf", type=Path, nargs="*", default=[])
    for name, default in (("--context", 256), ("--rounds", 9), ("--threads", 0)):
        parser.add_argument(name, type=int, default=default)
    options = parser.parse_args()
    decoding.use_threads(options.threads or "auto")
    config = StepConfig(tuple(map(int, options.tokens.split(","))), options.context, options.rounds)
    pair = decoding.load_pair(options.model, options.verifier, compress=options.compress)
    by_name = dict(in_each_form(pair))
    assert isinstance(pair.target, LeanDecoder)
    shape = pair.target.config
    lineup = Candidates(pair.target_name, by_name, shape, pair.dtype, shape.num_layers, pair.notes)

    def peers() -> list[Milliseconds]:
        return [llama_passes(options.llama_bench, file, config.tokens, config.rounds) for file in options.gguf]

    before, report, after = peers(), measure_steps(lineup, config), peers()
    faster = [{t: min(one[t], two[t]) for t in one} for one, two in zip(before, after, strict=True)]
    print_report(report, {f"llama.cpp, {file.name}": found for file, found in zip(options.gguf, faster, strict=True)})


if __name__ == "__main__":
    main()
