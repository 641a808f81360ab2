"""Rules on logits that one answer asks for: penalties by what it has written, and biases. Pure.

Letters: T rows of a pass, V vocabulary.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch


class WrittenPenalty:
    """Lower the logits of tokens that the answer has written: by `frequency` for each time, by `presence` once.

    OpenAI's definition; the prompt does not count.
    """

    def __init__(self, begin: int, presence: float, frequency: float) -> None:
        self.begin, self.presence, self.frequency = begin, presence, frequency

    def allowed(self, text: Sequence[int], draft: Sequence[int]) -> int:
        """All of a draft: nothing is forbidden."""
        return len(draft)

    def __call__(self, logits: torch.Tensor, prefix: Sequence[int], continuation: Sequence[int]) -> torch.Tensor:
        """Logits [T, V], each row by what stands before it."""
        counts = Counter(prefix[self.begin :])
        logits = logits.clone()
        for row in range(len(logits)):
            if row > 0:
                counts[continuation[row - 1]] += 1
            if counts:
                ids = torch.tensor(list(counts), device=logits.device)
                times = torch.tensor([float(count) for count in counts.values()], device=logits.device)
                logits[row, ids] -= self.frequency * times + self.presence
        return logits


class NoEnd:
    """Forbid the tokens that end an answer until it has `least` tokens, as transformers' `min_new_tokens` does."""

    def __init__(self, begin: int, least: int, ends: Iterable[int]) -> None:
        self.first, self.ends = begin + least, sorted(ends)

    def allowed(self, text: Sequence[int], draft: Sequence[int]) -> int:
        """The draft up to an end that comes too early."""
        early = max(self.first - len(text), 0)
        return next((i for i, token in enumerate(draft[:early]) if token in self.ends), len(draft))

    def __call__(self, logits: torch.Tensor, prefix: Sequence[int], continuation: Sequence[int]) -> torch.Tensor:
        """Logits [T, V] with −∞ for ends, in the rows of tokens that come too early for one."""
        early = max(self.first - len(prefix), 0)
        logits = logits.clone()
        logits[:early, self.ends] = -torch.inf
        return logits


class Bias:
    """Add a number to the logits of some tokens."""

    def __init__(self, biases: Mapping[int, float]) -> None:
        self.ids, self.values = list(biases), [float(value) for value in biases.values()]

    def allowed(self, text: Sequence[int], draft: Sequence[int]) -> int:
        """All of a draft: nothing is forbidden."""
        return len(draft)

    def __call__(self, logits: torch.Tensor, prefix: Sequence[int], continuation: Sequence[int]) -> torch.Tensor:
        """Logits [T, V], each row alike."""
        logits = logits.clone()
        logits[:, self.ids] += torch.tensor(self.values, device=logits.device)
        return logits
