"""How much faster a text is written when most of it is expected, as a file before an edit is (`--prediction`).

    python -m tools.measure_prediction MODEL VERIFIER [--dataset mt-bench] [--limit 20] [--max-new-tokens 192]

Each question is answered by plain decoding. What is expected is that answer with one word of every so many changed, so
that it is wrong there, and an edit is as long as a word; then the modes answer with it, in turn. A model that follows
instructions would write the same from a file and what is to be changed in it; small ones do not.
"""

import argparse
import gc
import re
from collections.abc import Mapping, Sequence

import numpy as np

import quasar_core as quasar
from quasar_core.api import decoding
from quasar_core.bench.datasets import load_datasets
from quasar_core.bench.metrics.estimates import Estimate, estimate, ratio_of_totals
from quasar_core.models.pair import Pair
from quasar_core.system import LoadMeter

EVERY = (5, 10, 20, 0)  # words of which one is another; 0: none is
MODES = ("full", "exact")
PLAIN = {"verify": "full", "draft": "none"}


def changed(text: str, every: int) -> str:
    """The text with the last of every so many words turned round; the same where `every` is 0."""
    words = re.split(r"(\s+)", text)  # words at even places, what is between them at odd ones
    for at in range(2 * (every - 1), len(words), 2 * every) if every else ():
        words[at] = words[at][::-1]
    return "".join(words)


class Written:
    """Tokens and seconds of an arm's answers, and their tokens."""

    def __init__(self) -> None:
        self.yields: list[tuple[float, float]] = []
        self.answers: list[tuple[int, ...]] = []
        self.drafted = self.accepted = 0

    def write(self, pair: Pair, prompt: str, tokens: int, **options: str) -> str:
        """Answer a prompt; seconds are those of decoding, without the prompt's pass."""
        result = quasar.generate(pair, prompt, max_new_tokens=tokens, **options)
        stats = result.stats
        self.yields.append((stats.new_tokens - stats.prefill_tokens, stats.decode_s))
        self.answers.append(tuple(result.token_ids))
        self.drafted, self.accepted = self.drafted + stats.drafted, self.accepted + stats.accepted
        return result.text


def measure(pair: Pair, prompts: Sequence[str], tokens: int) -> Mapping[tuple[str, int], Written]:
    """Answers by plain decoding, under ("plain", 0), and by each mode with each expected text."""
    arms = {("plain", 0): Written(), **{(mode, every): Written() for every in EVERY for mode in MODES}}
    for prompt in prompts:
        text = arms["plain", 0].write(pair, prompt, tokens, **PLAIN)
        for (mode, every), arm in arms.items():
            if mode != "plain":
                arm.write(pair, prompt, tokens, verify=mode, prediction=changed(text, every))
    return arms


def print_table(arms: Mapping[tuple[str, int], Written]) -> None:
    """Speeds by mode and by how much of the text was expected, and how many answers are plain decoding's."""
    plain = arms["plain", 0]
    print("| mode | expected | tokens/s | × plain | of drafts accepted | answers equal |\n|---|---|---|---|---|---|")
    for (mode, every), arm in arms.items():
        if mode == "plain":
            expected, accepted = "", ""
        else:
            expected = f"all but one word of {every}" if every else "all"
            accepted = f"{arm.accepted / max(arm.drafted, 1):.2f}"
        tokens, seconds = np.array(arm.yields).sum(axis=0)
        ratio = estimate(ratio_of_totals, np.array(arm.yields), np.array(plain.yields))
        equal = sum(mine == theirs for mine, theirs in zip(arm.answers, plain.answers, strict=True))
        cells = (mode, expected, f"{tokens / seconds:.1f}", shown(ratio), accepted, f"{equal} of {len(arm.answers)}")
        print(f"| {' | '.join(cells)} |")


def shown(ratio: Estimate) -> str:
    """A ratio with its interval."""
    low, high = ratio.interval or (ratio.value, ratio.value)
    return f"{ratio.value:.2f} ({low:.2f}–{high:.2f})"


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in ("model", "verifier"):
        parser.add_argument(name)
    parser.add_argument("--dataset", default="mt-bench")
    for name, default in (("--limit", 20), ("--max-new-tokens", 192)):
        parser.add_argument(name, type=int, default=default)
    options = parser.parse_args()
    decoding.use_threads("auto")
    pair = quasar.load(options.model, options.verifier)
    (dataset,) = load_datasets(options.dataset, options.limit)
    prompts = [question.turns[0] for question in dataset.questions]
    measure(pair, prompts[:1], 32)  # first passes pay for allocations
    gc.freeze()  # as the command line does
    meter = LoadMeter()
    print_table(measure(pair, prompts, options.max_new_tokens))
    if (others := meter.read().others) is not None:
        print(f"Other programs took {100 * others:.0f} % of the cores.")


if __name__ == "__main__":
    main()
