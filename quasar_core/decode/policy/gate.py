"""Decide which of the verifier's tokens go through without a confirm: the mode `gated`.

Where the verifier is sure enough of a token, it is committed at once; only the others wait for the target. So a share
of the tokens is not checked, and how many of those the target would have chosen otherwise is what `--fidelity` bounds.
Two things see to that. The tokens that are sure enough follow from P(agree | margin), whose curve is the one that
quantizing measured, corrected by what confirms find while decoding. And there is an error budget, as a curve may
promise too much of text that it was not measured on: a confirm passes what was let through since the last one too, so
that all keys and values become the target's, and so it is known of most tokens, if only afterwards, whether the target
agrees. Where the budget is spent, tokens are confirmed until it allows more.
"""

from collections.abc import Sequence
from itertools import takewhile

import numpy as np

from quasar_core.decode.policy.agreement import Estimate, RunningAgreement
from quasar_core.decode.policy.window_values import Agreements

NEVER = 2.0  # more than any probability
HEAD_START = 256  # tokens that count as confirmed before the first: else chance alone closes the gate early on


class Gate:
    """Lets tokens through whose P(agree) is at least `least`, within an error budget for all texts so far.

    `least` follows from the agreement, and is found anew. Of n tokens (1 − fidelity)·n may be lost, that is, another
    than the target's choice. Until a confirm tells, a token that went through counts as lost with a chance of
    1 − P(agree), or with the share of those before it that were lost, if that is larger. Tokens at a text's end, which
    no confirm passes, stay counted so.
    """

    def __init__(self, agreement: RunningAgreement, fidelity: float) -> None:
        self._agreement, self._fidelity = agreement, fidelity
        self.least = least_chance(agreement.now, fidelity)
        self._tokens, self._lost = HEAD_START, 0.0  # of all texts
        self._passed, self._wrong = 0, 0  # let through and passed by the target since; of those, lost
        self._waiting = 0.0  # counted as lost of this text's tokens that no confirm has passed

    def begin(self) -> None:
        """Another text begins."""
        self._waiting = 0.0

    def learn(self) -> None:
        """A confirm has corrected the agreement."""
        self.least = least_chance(self._agreement.now, self._fidelity)

    def let_through(self, estimates: Sequence[Estimate]) -> int:
        """How many of the window's first tokens go through: as many as are sure enough, within the error budget."""
        chances = (min(estimate.p, estimate.any) for estimate in estimates)
        usual, count = self._wrong / max(self._passed, 1), 0
        for chance in takewhile(lambda chance: chance >= self.least, chances):
            loss = max(1 - chance, usual)
            if self._lost + loss > (1 - self._fidelity) * (self._tokens + 1):
                break
            self._lost, self._waiting = self._lost + loss, self._waiting + loss
            self._tokens, count = self._tokens + 1, count + 1
        return count

    def passed(self, agreed: Sequence[bool]) -> None:
        """The target has passed all that went through since its last pass: which of them are its own."""
        wrong = sum(not own for own in agreed)
        self._passed, self._wrong = self._passed + len(agreed), self._wrong + wrong
        self._lost, self._waiting = self._lost + wrong - self._waiting, 0.0

    def confirmed(self, count: int) -> None:
        """The target has committed so many tokens of its own."""
        self._tokens += count


def least_chance(agreements: Agreements, fidelity: float) -> float:
    """The lowest chance at which tokens go through, so that of all tokens at least `fidelity` are the target's own.

    Tokens that are confirmed are; of bins that go through, Σ weight·(1 − chance) are not. NEVER where not even the
    surest bin's are few enough.
    """
    order = np.argsort(-agreements.chances, kind="stable")
    lost = np.cumsum(agreements.weights[order] * (1 - agreements.chances[order]))
    kept = int(np.searchsorted(lost, 1 - fidelity, side="right"))
    return float(agreements.chances[order[kept - 1]]) if kept else NEVER
