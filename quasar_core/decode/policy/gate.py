"""Decide which of the verifier's tokens go through without a confirm: the mode `gated`.

Where the verifier is sure enough of a token, it is committed at once; only the others wait for the target. So a share
of the tokens is not checked, and how many of those the target would have chosen otherwise is what `--fidelity` bounds:
among all tokens, as far as P(agree | margin) is known. Its curve is the one that quantizing measured, corrected by
what confirms find while decoding: a confirm passes what was let through since the last one too, so that all keys and
values become the target's, and so it is known of every token, if only afterwards, whether the target agrees.
"""

from collections.abc import Sequence
from itertools import takewhile

import numpy as np

from quasar_core.decode.policy.agreement import Estimate, RunningAgreement
from quasar_core.decode.policy.window_values import Agreements

NEVER = 2.0  # more than any probability


class Gate:
    """Lets tokens through whose P(agree) is at least `least`; that follows from the agreement, and is found anew."""

    def __init__(self, agreement: RunningAgreement, fidelity: float) -> None:
        self._agreement, self._fidelity = agreement, fidelity
        self.least = least_chance(agreement.now, fidelity)

    def learn(self) -> None:
        """A confirm has corrected the agreement."""
        self.least = least_chance(self._agreement.now, self._fidelity)

    def sure(self, estimates: Sequence[Estimate]) -> int:
        """How many of the window's first tokens go through."""
        return sum(1 for _ in takewhile(lambda estimate: min(estimate.p, estimate.any) >= self.least, estimates))


def least_chance(agreements: Agreements, fidelity: float) -> float:
    """The lowest chance at which tokens go through, so that of all tokens at least `fidelity` are the target's own.

    Tokens that are confirmed are; of bins that go through, Σ weight·(1 − chance) are not. NEVER where not even the
    surest bin's are few enough.
    """
    order = np.argsort(-agreements.chances, kind="stable")
    lost = np.cumsum(agreements.weights[order] * (1 - agreements.chances[order]))
    kept = int(np.searchsorted(lost, 1 - fidelity, side="right"))
    return float(agreements.chances[order[kept - 1]]) if kept else NEVER
