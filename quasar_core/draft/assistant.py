"""A small draft model with the target's vocabulary and a KV cache of its own."""

from collections.abc import Sequence
from typing import Any

from quasar_core.models.base import NO_TOKEN, CausalLM
from quasar_core.models.rollback import reachable

ROOM = 1024  # positions by which its cache grows
CHUNK = 512  # tokens of a pass over a prompt
SHORT = 16  # tokens whose pass lists a choice for each


class Assistant:
    """Speculative decoding's draft model (Leviathan et al., 2023; Chen et al., 2023); implements `Guesser`.

    Its cache follows the text: what the text no longer holds is rolled back, what is new passes in one pass. It lives
    as long as a conversation, whose next prompt begins like the text before.
    """

    def __init__(self, model: CausalLM, ratio: float, vocabulary: int, context: int) -> None:
        self.model, self.ratio = model, ratio
        self.vocabulary = vocabulary  # tokens that the target knows: both may have rows that stand for none
        self.context = context  # tokens of a text beyond which it guesses nothing
        self._cache: Any = None
        self._passed: list[int] = []

    def follow(self, text: Sequence[int], common: int) -> tuple[int, float]:
        """See `Guesser`; at least the last token passes."""
        if len(text) > self.context:
            return NO_TOKEN, 0.0
        kept = min(common, len(self._passed), len(text) - 1)
        while kept < min(len(self._passed), len(text) - 1) and self._passed[kept] == text[kept]:
            kept += 1
        kept = self._make_room(len(text), kept)
        new = text[kept:]
        while len(new) > SHORT:
            piece = new[: min(CHUNK, len(new) - 1)]
            self.model.forward(piece, self._cache, last_only=True)
            new = new[len(piece) :]
        choices = self.model.choose(new, self._cache)
        self._passed[kept:] = text[kept:]
        token = choices.tokens[-1]
        return (token if token < self.vocabulary else NO_TOKEN), choices.margins[-1]

    def _make_room(self, count: int, kept: int) -> int:
        """Move the cache to the `kept` tokens; a longer text gets a new one, which is filled from the beginning.

        How many of them it holds: a recurrent model's states do not go back to each.
        """
        if self._cache is None or self._cache.capacity < count:
            self._cache = self.model.new_cache((count // ROOM + 1) * ROOM)
            known, self._passed = self._passed[:kept], []
            for begin in range(0, kept, CHUNK):
                self.model.forward(known[begin : begin + CHUNK], self._cache, last_only=True)
            self._passed = known
        kept = reachable(self._cache, kept)
        self._cache.rollback(kept)
        del self._passed[kept:]
        return kept
