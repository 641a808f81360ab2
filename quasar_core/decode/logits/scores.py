"""Log-probabilities of a text's tokens, and of the best tokens in their places.

They are those of the model that decides: its own logits, before penalties, grammars, temperature and cuts.
Letters: T rows of a pass, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from quasar_core.models.pair import Pair

ROWS = 64  # of a pass whose logits are all kept: 64 rows of 152k take 39 MB


@dataclass(frozen=True)
class TokenScore:
    """A token, its log-probability in nats, and the best tokens in its place, the best first."""

    token: int
    logprob: float
    best: tuple[tuple[int, float], ...] = ()


class Scores:
    """Collects the scores of an answer's tokens, with the `top` best of each place."""

    def __init__(self, top: int = 0) -> None:
        self.top = top
        self.tokens: list[TokenScore] = []

    def add(self, logits: torch.Tensor, tokens: Sequence[int]) -> None:
        """The text goes on with `tokens`; row i of the logits [T, V], T at least as many, is that of token i."""
        self.tokens += score_rows(logits[: len(tokens)], tokens, self.top)


def score_rows(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[TokenScore]:
    """The score of token i under row i of logits [T, V]."""
    if not tokens:
        return []
    logprobs = logits.float().log_softmax(dim=-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    best, ids = logprobs.topk(min(top, logprobs.shape[-1]), dim=-1)
    pairs = [tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), best.tolist(), strict=True)]
    return [TokenScore(*row) for row in zip(tokens, own, pairs, strict=True)]


def score_text(pair: Pair, ids: Sequence[int], top: int, before_pass: Callable[[], None]) -> list[TokenScore]:
    """The scores of every token of a text but the first, which nothing predicts, by the model that runs prompts."""
    cache = pair.new_cache(len(ids))
    scores = Scores(top)
    for begin in range(0, len(ids) - 1, ROWS):
        before_pass()
        piece = ids[begin : min(begin + ROWS, len(ids) - 1)]
        scores.add(pair.primary.forward(piece, cache), ids[begin + 1 : begin + 1 + len(piece)])
    return scores.tokens
