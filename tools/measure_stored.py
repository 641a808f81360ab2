"""How much faster a pair decodes than its target with weights as they are stored: 16 bits each, plain decoding.

    python -m tools.measure_stored MODEL VERIFIER [--dataset spec-bench] [--limit 78] [--max-new-tokens 96]

`quasar bench` compares with plain decoding on the weights that quasar holds in memory, which on many CPUs are 12 bits
each without loss, and there faster than those of 16 that other programs read. Here the target is loaded both ways, and
all arms answer question by question in turn: the first on 16 bits, the others on 12.
"""

import argparse
import gc
from dataclasses import replace
from typing import Any

import numpy as np

from quasar_core.api import decoding
from quasar_core.bench.arms import ARMS, Arm, BenchConfig
from quasar_core.bench.datasets import Question, load_datasets
from quasar_core.bench.metrics.estimates import Yields, estimate, ratio_of_totals
from quasar_core.bench.run import Conversation, lead
from quasar_core.decode.generator import Generator
from quasar_core.system import LoadMeter

STORED = replace(ARMS["vanilla"], name="plain, as stored")
HELD = [replace(ARMS["vanilla"], name="plain"), ARMS["full"], ARMS["exact"], ARMS["quantized"]]


class Answers:
    """What an arm's answers to each question yielded and took, and their tokens."""

    def __init__(self, arm: Arm, generator: Generator) -> None:
        self.arm, self.generator = arm, generator
        self.yields: list[tuple[float, float]] = []
        self.tokens: list[list[int]] = []

    def ask(self, dataset: str, question: Question, config: BenchConfig) -> None:
        """Lead the conversation; seconds are those of decoding, without the prompt's pass."""
        rows = lead(self.generator, Conversation(dataset, question, 0, self.arm), config)
        stats = [row.stats for row in rows if row.stats]
        if len(stats) < len(rows):
            raise SystemExit(next(row.error for row in rows if row.error))
        self.yields.append((sum(one.new_tokens - one.prefill_tokens for one in stats), sum(s.decode_s for s in stats)))
        self.tokens.append([token for row in rows for token in row.token_ids])

    @property
    def totals(self) -> Yields:
        """Tokens and seconds of each question [n, 2]."""
        return np.array(self.yields)


def print_table(arms: list[Answers]) -> None:
    """Speeds, their ratios to both kinds of plain decoding with intervals, and how many answers are the first arm's."""
    stored, plain = arms[0], arms[1]
    print("| arm | tokens/s | × plain, as stored | × plain | answers equal |\n|---|---|---|---|---|")
    for one in arms:
        tokens, seconds = one.totals.sum(axis=0)
        ratios = [estimate(ratio_of_totals, one.totals, other.totals) for other in (stored, plain)]
        shown = [f"{r.value:.2f} ({r.interval[0]:.2f}–{r.interval[1]:.2f})" if r.interval else "" for r in ratios]
        equal = sum(mine == theirs for mine, theirs in zip(one.tokens, stored.tokens, strict=True))
        print(f"| {one.arm.name} | {tokens / seconds:.1f} | {' | '.join(shown)} | {equal} of {len(one.tokens)} |")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in ("model", "verifier"):
        parser.add_argument(name)
    parser.add_argument("--dataset", default="spec-bench")
    for name, default in (("--limit", 78), ("--max-new-tokens", 96)):
        parser.add_argument(name, type=int, default=default)
    return parser.parse_args()


def main() -> None:
    """See the module's text."""
    options = parse()
    decoding.use_threads("auto")
    config = BenchConfig(("vanilla", "full", "exact", "quantized"), max_new_tokens=options.max_new_tokens)
    load: dict[str, Any] = {"model": options.model, "verifier": options.verifier}
    pairs = decoding.load_pair(**load, verify="full", compress=False), decoding.load_pair(**load, compress=True)
    places = [(STORED, pairs[0]), *((arm, pairs[1]) for arm in HELD)]
    arms = [Answers(arm, Generator(pair, config.generation(arm, 0.0))) for arm, pair in places]
    (dataset,) = load_datasets(options.dataset, options.limit)
    for one in arms:  # first passes pay for allocations
        one.generator.generate(pairs[0].tokenizer.encode(dataset.questions[0].turns[0]))
    gc.freeze()  # as the command line does
    meter = LoadMeter()
    for number, question in enumerate(dataset.questions):
        first = number % len(arms)
        for one in (*arms[first:], *arms[:first]):
            one.ask(dataset.name, question, config)
    print_table(arms)
    if (others := meter.read().others) is not None:
        print(f"Other programs took {100 * others:.0f} % of the cores.")


if __name__ == "__main__":
    main()
