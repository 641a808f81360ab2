"""How far a sampled text lies from plain sampling of a table: chi-square of its transitions.

A right decoder is suspected by chance once in a million runs; what is broken on purpose gets a p-value a thousand times
smaller.
"""

import itertools
from collections import Counter
from collections.abc import Sequence

import torch
from helpers.tiny_models import TableModel
from transformers import RepetitionPenaltyLogitsProcessor

from quasar_core.config import SamplingConfig
from quasar_core.decode.logits.sampling import keep_likely

VOCABULARY = 5
PROMPT = [1, 2, 1, 2]
TARGET = TableModel(VOCABULARY, seed=0)
PLAIN = SamplingConfig(temperature=1.0)
SUSPICIOUS, IMPOSSIBLE = 1e-6, 1e-9


def next_token(context: Sequence[int], sampling: SamplingConfig) -> list[float]:
    """The target's distribution after a context."""
    logits = TARGET.table[context[-2], context[-1]][None]
    penalized = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty or 1.0)(torch.tensor([context]), logits)
    return (keep_likely(penalized, sampling)[0] / sampling.temperature).softmax(dim=-1).tolist()


def chi_square(cells: list[tuple[float, float]]) -> tuple[float, int]:
    """The statistic and the number of cells of (observed, expected) pairs; rare cells are merged."""
    common = [cell for cell in cells if cell[1] >= 5]
    rare = [cell for cell in cells if 0 < cell[1] < 5]
    if rare:
        common.append((sum(o for o, _ in rare), sum(e for _, e in rare)))
    return sum((o - e) ** 2 / e for o, e in common), len(common)


def p_value(statistic: float, freedom: int) -> float:
    """P(a chi-square variable of so many degrees of freedom is larger)."""
    halves = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(halves[0], halves[1]))


def p_of_transitions(text: Sequence[int], sampling: SamplingConfig = PLAIN) -> float:
    """The same for the tokens that follow each pair of tokens in a long text."""
    whole = [*PROMPT, *text]
    counts = Counter(zip(whole[2:], whole[3:], whole[4:], strict=False))
    statistic, freedom = 0.0, 0
    for pair in itertools.product(range(VOCABULARY), repeat=2):
        observed = [counts[(*pair, token)] for token in range(VOCABULARY)]
        expected = [sum(observed) * p for p in next_token(pair, sampling)]
        if any(o > 0 and e == 0 for o, e in zip(observed, expected, strict=True)):
            return 0.0
        if sum(observed) >= 20:
            value, cells = chi_square(list(zip(observed, expected, strict=True)))
            statistic, freedom = statistic + value, freedom + cells - 1
    return p_value(statistic, freedom)
