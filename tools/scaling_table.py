"""What speculation may gain by the number of texts decoded at once: a calculation from sizes and rates, not a measure.

python -m tools.scaling_table --target-gb 16.4 --copy-gb 6.1 --bandwidth-gbs 3350 --tflops 990

A pass over R rows takes as long as reading the weights once or computing 2 operations a weight and row, whichever is
longer; keys and values are read on top. Then the cost model of decoding says what each way of drafting yields.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quasar_core.decode.costs.pass_costs import Cost, PairCosts
from quasar_core.decode.policy.lengths import TYPICAL_ACCEPTANCE, pass_rate, plan_exact
from quasar_core.decode.policy.window_values import Agreements
from quasar_core.deploy.batch import Shared

TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
LONGEST = 16  # tokens of a draft by the copy
USEFUL = 1.03  # less than this gain is not worth a second model


@dataclass(frozen=True)
class Machine:
    """Bytes and operations per second that passes reach, on all GPUs together, and seconds that any pass takes."""

    bandwidth: float
    operations: float
    overhead: float = 0.0


@dataclass(frozen=True)
class Roofline:
    """Seconds of a pass over rows of `texts` texts of one length: memory or arithmetic, whichever is slower."""

    machine: Machine
    weight_bytes: float
    weights: float
    texts: int
    text_bytes: float  # keys and values of one text

    def at(self, positions: float) -> "Roofline":
        """The same behind any number of positions: `text_bytes` are those of a text's whole length."""
        return self

    def __call__(self, tokens: int) -> float:
        """Seconds of a pass over so many rows."""
        reading = (self.weight_bytes + self.texts * self.text_bytes) / self.machine.bandwidth
        return max(reading, 2 * self.weights * tokens / self.machine.operations) + self.machine.overhead


@dataclass(frozen=True)
class Gains:
    """Speeds in those of plain decoding of as many texts."""

    texts: int
    plain: float  # tokens per second of all of them together
    ngram: float
    draft_model: float
    draft_length: int
    quasar: float


def gains(target: Roofline, copy: Roofline, single_copy: Cost, agreement: float) -> Gains:
    """Of n-grams, of the copy that drafts for all texts at once, and of ours, which drafts for one after another."""
    texts = target.texts
    confirm = Shared(target, texts)
    plain = pass_rate(confirm, 0.0)
    ngram = max(pass_rate(confirm, TYPICAL_ACCEPTANCE), plain)
    rates = [draft_rate(confirm, Shared(copy, texts), agreement, length) for length in range(LONGEST + 1)]
    length = int(np.argmax(rates))
    known = Agreements(np.array([agreement]), np.array([1.0]))
    ours = max(plan_exact(PairCosts(single_copy, confirm), known).rate, ngram)
    return Gains(texts, plain, ngram / plain, rates[length] / plain, length, ours / plain)


def draft_rate(confirm: Cost, copy: Cost, agreement: float, length: int) -> float:
    """Tokens per second and text, where the copy writes `length` tokens one by one and the target checks them."""
    tokens = sum(agreement**place for place in range(length + 1))
    return tokens / (length * copy(1) + confirm(length + 1))


def pays_to(rows: Sequence[Gains], name: str) -> int | None:
    """The most texts at which a way of drafting still pays; None where it never does."""
    return max((row.texts for row in rows if getattr(row, name) >= USEFUL), default=None)


def table(rows: Sequence[Gains]) -> str:
    """In Markdown."""
    lines = [
        "| texts at once | plain, tokens/s of all | n-grams | copy as draft model (tokens drafted) | quasar's drafts |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        drafted = f"{row.draft_model:.2f} ({row.draft_length})" if row.draft_length else "1.00 (0)"
        lines.append(f"| {row.texts} | {row.plain:,.0f} | {row.ngram:.2f} | {drafted} | {row.quasar:.2f} |")
    return "\n".join(lines)


def calculate(options: argparse.Namespace) -> list[Gains]:
    """A row for each number of texts."""
    machine = Machine(
        options.bandwidth_gbs * 1e9 * options.gpus * options.efficiency,
        options.tflops * 1e12 * options.gpus * options.compute_efficiency,
        options.overhead_ms / 1e3,
    )
    one = Machine(machine.bandwidth / options.gpus, machine.operations / options.gpus, machine.overhead)
    weights, text = options.target_gb * 1e9 / 2, options.context * options.token_kb * 1e3
    rows = []
    room = options.gpus * options.memory_gb * 1e9 - (options.target_gb + options.copy_gb) * 1e9
    for texts in [count for count in TEXTS if count * text <= room]:
        target = Roofline(machine, options.target_gb * 1e9, weights, texts, text)
        copy = Roofline(machine, options.copy_gb * 1e9, weights, texts, text)
        single = Roofline(one, options.copy_gb * 1e9, weights, 1, text)  # on the first rank alone
        rows.append(gains(target, copy, single, options.agreement))
    return rows


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The sizes of a model and the rates of a machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target-gb", type=float, default=16.4, help="the target's weights, at two bytes each")
    parser.add_argument("--copy-gb", type=float, default=6.1, help="the low-bit copy's weights")
    parser.add_argument("--bandwidth-gbs", type=float, default=3350.0, help="GB/s of a GPU's memory")
    parser.add_argument("--tflops", type=float, default=990.0, help="10^12 operations per second of a GPU")
    parser.add_argument("--memory-gb", type=float, default=80.0, help="of a GPU: more texts than fit are left out")
    parser.add_argument("--efficiency", type=float, default=0.6, help="the part of the bandwidth that passes reach")
    parser.add_argument("--compute-efficiency", type=float, default=0.4, help="the part of the operations")
    parser.add_argument("--overhead-ms", type=float, default=1.0, help="of any pass, the engine's own work included")
    parser.add_argument("--gpus", type=int, default=1, help="that share the target out")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a text")
    parser.add_argument("--token-kb", type=float, default=147.5, help="kB of keys and values of a token")
    parser.add_argument("--agreement", type=float, default=0.95, help="of the copy with the target")
    return parser.parse_args(words)


def main() -> None:
    """Print the table, and how far each way of drafting pays."""
    rows = calculate(parse())
    print(table(rows))
    for name in ("ngram", "draft_model", "quasar"):
        most = pays_to(rows, name)
        print(f"{name}: pays up to {most} texts at once" if most else f"{name}: does not pay")


if __name__ == "__main__":
    main()
