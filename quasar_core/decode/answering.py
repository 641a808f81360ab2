"""What one answer may be given beside its prompt, and what can be seen of it while it is written.

`TokenRule`s change the logits, as a grammar or a penalty does; `before_pass` may end an answer between two passes, in
the prompt too; `scores` keeps log-probabilities. Letters: T rows of a pass, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from quasar_core.decode.logits.scores import Scores
from quasar_core.decode.text import Reading
from quasar_core.models.base import go_on
from quasar_core.records import Stats


class Stopped(Exception):
    """Raised by `before_pass` to end an answer: what is passed by then stays of use."""


class TokenRule(Protocol):
    """Changes the logits by the text so far, the same for every model of a pair; tokens are prompt and answer."""

    def allowed(self, text: Sequence[int], draft: Sequence[int]) -> int:
        """How many tokens of a draft behind the text may stand."""
        ...

    def __call__(self, logits: torch.Tensor, prefix: Sequence[int], continuation: Sequence[int]) -> torch.Tensor:
        """Changed logits [T, V], a new tensor; row i follows `prefix` and i tokens of the continuation."""
        ...


def ignore(tokens: Sequence[int]) -> None:
    """Nobody looks at what waits."""


@dataclass
class Answering:
    """What one answer is given beside its prompt."""

    rules: Sequence[TokenRule] = ()
    before_pass: Callable[[], None] = go_on
    scores: Scores | None = None
    reading: Reading = field(default_factory=Reading)
    ends: frozenset[int] | None = None  # tokens that end the answer; None: the model's own
    tokens: list[int] = field(default_factory=list)  # of the answer, those whose text was yielded or waits
    waiting: Callable[[Sequence[int]], None] = ignore  # told, after each step, the tokens that wait for a confirm
    stats: Stats | None = None  # of the answer, once its prompt is passed

    def allowed(self, text: Sequence[int], draft: Sequence[int]) -> int:
        """How many tokens of a draft all rules let stand."""
        return min((rule.allowed(text, draft) for rule in self.rules), default=len(draft))

    def apply(self, logits: torch.Tensor, prefix: Sequence[int], continuation: Sequence[int]) -> torch.Tensor:
        """All rules, one after another."""
        for rule in self.rules:
            logits = rule(logits, prefix, continuation)
        return logits
