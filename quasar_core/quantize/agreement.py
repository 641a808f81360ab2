"""`--target-agreement`: the smallest checkpoint that reaches it, by bisection over the budgets of mixed widths.

A trial quantizes every block at a budget and measures the agreement of what it committed, without a checkpoint. More
bits are taken to agree more, so that four trials settle the budget among the steps of a quarter bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from quasar_core.errors import QuasarError
from quasar_core.quantize.commits import block_file, read_commit
from quasar_core.quantize.layerwise import replace_weights
from quasar_core.quantize.streaming import StreamedModel

BUDGETS = tuple(step / 4 for step in range(9, 25))  # bits, from 2.25 to 6


@dataclass(frozen=True)
class Trial:
    """A budget in bits, and the agreement that it gave."""

    bits: float
    agreement: float


def smallest_budget(aim: float, measure: Callable[[float], float]) -> Trial:
    """The smallest of `BUDGETS` whose agreement reaches `aim`; QuasarError where the largest does not.

    `measure` is asked at most five times.
    """
    best: Trial | None = None
    low, high = 0, len(BUDGETS)
    trials: list[Trial] = []
    while low < high:
        middle = (low + high) // 2
        trial = Trial(BUDGETS[middle], measure(BUDGETS[middle]))
        trials.append(trial)
        if trial.agreement >= aim:
            best, high = trial, middle
        else:
            low = middle + 1
    if best is None:
        most = max(trials, key=lambda trial: trial.agreement)
        raise QuasarError(
            f"--target-agreement {aim:g} was not reached: {most.bits:g} bits agree {most.agreement:.4f}. "
            "Ask for less, for smaller groups (--group-size 32), or for --bits 8."
        )
    return best


class CommittedModel:
    """A model whose blocks are the target's with what a folder of commits holds in place; read like `StreamedModel`."""

    def __init__(self, target: StreamedModel, commits: Path) -> None:
        self._target, self._commits = target, commits
        self.prefix, self.count, self.device = target.prefix, target.count, target.device

    def block(self, index: int) -> torch.nn.Module:
        """One block, its layers as quantized."""
        block = self._target.block(index)
        replace_weights(block, f"{self.prefix}.{index}", read_commit(block_file(self._commits, index)))
        return block

    def ends(self, device: torch.device | None = None) -> PreTrainedModel:
        """The target's embedding, final norm and head."""
        return self._target.ends(device)
