"""A target of random tables, and pairs of low-bit copies that draft for it."""

from typing import Any

from helpers.tiny_models import TableModel, make_pair

from quasar_core.decode.costs.cost_records import CostRecord
from quasar_core.decode.costs.pass_costs import PassCost
from quasar_core.models.base import CausalLM
from quasar_core.models.pair import Pair

VOCABULARY = 17
TARGET = TableModel(VOCABULARY, seed=3)
COST = PassCost((1, 33), (1.0, 1.6))  # of the copy, in the clock's ticks


def pair_of(copy: CausalLM, **changes: Any) -> Pair:
    """The copy alone, with known costs."""
    pair = make_pair(None, copy, **changes)
    pair.measured["verifier"] = CostRecord(COST, {"role": "verifier"}, 0.0)
    return pair


def plain(prompt: list[int], count: int) -> list[int]:
    """The target's greedy text, token by token."""
    cache, tokens = TARGET.new_cache(1000), list(prompt)
    logits = TARGET.forward(prompt, cache)
    for _ in range(count):
        tokens.append(int(logits[-1].argmax()))
        logits = TARGET.forward(tokens[-1:], cache)
    return tokens[len(prompt) :]
