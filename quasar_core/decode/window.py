"""When to confirm: as soon as the window has probably gone wrong, or is full (DESIGN §3)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quasar_core.decode.costs import PairCosts
from quasar_core.decode.draft_length import expected_pass
from quasar_core.records import MarginTable

MAX_WINDOW = 32
DEFAULT_WINDOW = 8
CYCLES = 1000
# Of a token that n-grams draft, where the pass of any draft costs the same: 1.5 tokens a verify. The choice of the
# window depends on it weakly.
TYPICAL_ACCEPTANCE = 1 / 3


@dataclass(frozen=True)
class WindowPolicy:
    """Confirm when the product of P(agree) falls below `threshold`, or at `limit` tokens."""

    limit: int
    threshold: float = 0.0
    agreement: "AgreementCurve | None" = None

    def survival(self, margin: float) -> float:
        """P(agree) of a token verified with this margin; 1 where nothing is known."""
        return self.agreement(margin) if self.agreement else 1.0

    def is_due(self, tokens: int, survival: float) -> bool:
        """Whether a window of this many tokens, right with probability `survival`, should be confirmed."""
        return tokens >= self.limit or survival < self.threshold


class AgreementCurve:
    """P(agree | margin) from a margin table; each bin smoothed by one agreement and one disagreement."""

    def __init__(self, table: MarginTable) -> None:
        self.edges = np.array(table.edges)
        self.values = (np.array(table.agreed) + 1.0) / (np.array(table.counts) + 2.0)
        self.weights = np.array(table.counts) / max(sum(table.counts), 1)

    def __call__(self, margin: float) -> float:
        """The agreement of the bin that holds the margin."""
        return float(self.values[np.searchsorted(self.edges, margin, side="right")])

    def sample(self, shape: tuple[int, int], seed: int = 0) -> NDArray[np.float64]:
        """Agreements of tokens drawn as often as their margins occurred."""
        rng = np.random.default_rng(seed)
        return self.values[rng.choice(len(self.values), size=shape, p=self.weights)]


def best_window(
    curve: AgreementCurve, costs: PairCosts, acceptance: float = TYPICAL_ACCEPTANCE
) -> tuple[WindowPolicy, float]:
    """The limit and threshold of the most committed tokens per second, and that rate, by simulating cycles.

    A cycle whose window holds n tokens of agreements p_1 … p_n costs n ÷ (tokens of a verify) verify passes and a
    confirm of n + 1 tokens, and commits p_1 + p_1·p_2 + … + p_1⋯p_n tokens and the bonus.
    """
    alive = np.cumprod(curve.sample((CYCLES, MAX_WINDOW)), axis=1)
    gained = np.cumsum(alive, axis=1) + 1.0
    confirm = np.array([costs.confirm(n + 1) for n in range(1, MAX_WINDOW + 1)])
    verified, verify = expected_pass(acceptance, costs.verify)
    best, best_rate = WindowPolicy(1, 0.0, curve), 0.0
    for limit in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32):
        for threshold in np.linspace(0.0, 0.95, 20):
            below = alive[:, :limit] < threshold
            last = np.where(below.any(axis=1), below.argmax(axis=1), limit - 1)
            tokens = gained[np.arange(CYCLES), last].mean()
            seconds = (np.ceil((last + 1) / verified) * verify + confirm[last]).mean()
            if tokens / seconds > best_rate:
                best, best_rate = WindowPolicy(limit, float(threshold), curve), float(tokens / seconds)
    return best, best_rate
