"""Plain decoding beside spinning processes: fixed numbers of threads against `auto`, interleaved.

    python tools/measure_load.py MODEL [--busy 0,2,4] [--threads 1,2] [--rounds 5] [--tokens 32] [--plain-pass]

For each number of spinning processes it prints tokens per second of each number of threads, all tokens ÷ all seconds
of the rounds, and that of `auto`, ÷ the best fixed number and ÷ one thread. Run it on a machine that does nothing else,
and let each arm compute for some seconds: beside other processes the same thread takes half or twice the time for a
while.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from quasar_core.api import decoding
from quasar_core.config import Auto, GenerationConfig
from quasar_core.decode.generator import Generator
from quasar_core.kernels.threads import describe_threads
from quasar_core.models.pair import Pair

SPIN = "while True: pass"
AUTO: Auto = "auto"


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Other processes that spin, ended at the end."""
    others = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        time.sleep(0.5)
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def decode(pair: Pair, prompt: Sequence[int], tokens: int) -> tuple[int, float]:
    """The tokens of one answer and their seconds, its prompt left out."""
    config = GenerationConfig(tokens, "full", "none")
    stats = Generator(pair, config).generate(prompt).stats
    return stats.new_tokens - 1, stats.decode_s


def measure(
    pair: Pair, prompt: Sequence[int], arms: Sequence[int | Auto], rounds: int, tokens: int
) -> dict[int | Auto, float]:
    """Tokens per second of each arm over all rounds; arms take turns, in the other order every second round."""
    rows: dict[int | Auto, list[tuple[int, float]]] = {arm: [] for arm in arms}
    for turn in range(rounds):
        for arm in arms if turn % 2 else reversed(arms):
            decoding.use_threads(arm)
            rows[arm].append(decode(pair, prompt, tokens))
            if arm == AUTO:
                print(f"  {describe_threads()}", file=sys.stderr)
    totals = {arm: [sum(column) for column in zip(*values, strict=True)] for arm, values in rows.items()}
    return {arm: tokens / seconds for arm, (tokens, seconds) in totals.items()}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--busy", default="0,2,4")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--plain-pass", action="store_true", help="PyTorch's operations, not the C++ pass")
    asked = parser.parse_args()
    pair = decoding.load_pair(asked.model, verify="full")
    if asked.plain_pass:
        pair.target.fast = None  # type: ignore[union-attr]
    prompt = pair.tokenizer("The history of the steam engine begins")["input_ids"]
    fixed = [int(number) for number in asked.threads.split(",")]
    print("busy  " + "".join(f"{f'{n} threads':>12}" for n in fixed) + f"{'auto':>12}{'÷ best':>10}{'÷ one':>10}")
    for count in map(int, asked.busy.split(",")):
        with busy(count):
            speed = measure(pair, prompt, [*fixed, AUTO], asked.rounds, asked.tokens)
        ratios = speed[AUTO] / max(speed[n] for n in fixed), speed[AUTO] / speed[min(fixed)]
        print(f"{count:<6}" + "".join(f"{s:>12.1f}" for s in speed.values()) + "".join(f"{r:>10.2f}" for r in ratios))


if __name__ == "__main__":
    main()
