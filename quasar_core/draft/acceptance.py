"""Estimate how often draft tokens are right, for each drafter and each class of sureness."""

from collections.abc import Iterable, Sequence

from quasar_core.draft.base import Draft, Piece

PRIOR_TRIALS = 4.0
PRIOR_ACCEPTANCE = {0: 0.25, 1: 0.4, 2: 0.6, 3: 0.75}  # of surer ones, as of 3
FADING = 0.99  # old trials fade, as texts change

_Class = tuple[str, int]


class Acceptance:
    """P(a draft token is right | source, sureness, all before it were right): a running mean that begins at a prior."""

    def __init__(self) -> None:
        self._right: dict[_Class, float] = {}
        self._tried: dict[_Class, float] = {}
        self._estimates: dict[_Class, float] = {}  # of classes of which nothing was learned since

    def __call__(self, source: str, sureness: int) -> float:
        """The estimate of a class."""
        key = source, sureness
        if key not in self._estimates:
            right = self._right.get(key, 0.0) + prior(sureness) * PRIOR_TRIALS
            self._estimates[key] = right / (self._tried.get(key, 0.0) + PRIOR_TRIALS)
        return self._estimates[key]

    def of(self, draft: Draft) -> list[float]:
        """The estimate of each token of a draft."""
        return [value for piece in draft.pieces for value in [self(piece.source, piece.sureness)] * piece.length]

    def count(self, pieces: Sequence[Piece], accepted: int) -> None:
        """`accepted` tokens of a draft of these pieces were right; the next was wrong, those behind it never tried."""
        for piece in pieces:
            right = min(piece.length, accepted)
            self.fade([(piece.source, piece.sureness)], FADING)
            self._right[piece.source, piece.sureness] += right
            self._tried[piece.source, piece.sureness] += right + (right < piece.length)
            accepted -= right
            if right < piece.length:
                return

    def fade(self, classes: Iterable[_Class], factor: float) -> None:
        """Believe less in what was learned of some classes."""
        for key in classes:
            self._estimates.pop(key, None)
            for counts in (self._right, self._tried):
                counts[key] = counts.get(key, 0.0) * factor

    def fade_all(self, factor: float) -> None:
        """Believe less in all that was learned."""
        self.fade(list(self._tried), factor)


def prior(sureness: int) -> float:
    """What is assumed of a class before anything of it was tried."""
    return PRIOR_ACCEPTANCE[min(max(sureness, 0), max(PRIOR_ACCEPTANCE))]
