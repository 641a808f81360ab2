"""Keep the caches of the latest texts, so that a prompt that begins as one of them did passes only its rest.

Several are kept where several conversations take turns: a front end that asks for a title between two turns would
otherwise throw the conversation's cache away.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from quasar_core.models.base import KVCache
from quasar_core.models.pair import Pair
from quasar_core.models.rollback import reachable
from quasar_core.models.rope import begin_text

BLOCK = 1024  # positions: the capacity of a cache is a multiple of it
ENDING = 16  # tokens of a prompt's end that a template may write otherwise in the next turn


@dataclass
class Prefix:
    """A cache and the tokens that it holds; `prompt_length` of them were the prompt of the last answer."""

    cache: KVCache
    tokens: list[int] = field(default_factory=list)
    prompt_length: int = 0
    turn: int = 0  # when it was last taken

    def common(self, prompt: Sequence[int]) -> int:
        """How many tokens begin the prompt too; one at least of the prompt is passed anew."""
        common = 0
        for old, new in zip(self.tokens, prompt[:-1], strict=False):
            if old != new:
                break
            common += 1
        return common


class Prefixes:
    """At most `most` caches, of `most_positions` positions together; with `most` 0 one cache, of which nothing is kept.

    The one that serves next is chosen by the longest common beginning, and taken over where the text goes on behind
    the last prompt, or where more of it is of use than is lost. Otherwise a new one is made, or the one that was not
    used for the longest time is written over.
    """

    def __init__(self, pair: Pair, most: int = 1, most_positions: int | None = None) -> None:
        self.pair, self.most, self.most_positions = pair, most, most_positions
        self._kept: list[Prefix] = []
        self._turn = 0

    def take(self, prompt: Sequence[int], max_tokens: int) -> tuple[Prefix, int]:
        """A cache with room for `max_tokens`, and how many of the prompt's tokens it holds already."""
        prefix = self._choose(prompt, max_tokens)
        self._turn += 1
        prefix.turn = self._turn
        common = reachable(prefix.cache, prefix.common(prompt)) if self.most else 0
        prefix.cache.rollback(common)
        kept = begin_text(prefix.cache, len(prompt), common)
        prefix.tokens, prefix.prompt_length = prefix.tokens[:kept], len(prompt)
        return prefix, kept

    def keep(self, prefix: Prefix, tokens: list[int]) -> None:
        """The cache holds `tokens`, or of a pass that ended midway some of them; what is behind them is of no use."""
        if not self.pair.rolls_back:
            self._kept = [other for other in self._kept if other is not prefix]
            return
        prefix.tokens = tokens[: reachable(prefix.cache, len(tokens))]
        prefix.cache.rollback(len(prefix.tokens))

    def forget(self) -> None:
        """No text is of use any more; the memory stays."""
        for prefix in self._kept:
            prefix.tokens = []

    def release(self) -> None:
        """Hold no cache any more."""
        self._kept = []

    def _choose(self, prompt: Sequence[int], max_tokens: int) -> Prefix:
        fitting = [prefix for prefix in self._kept if prefix.cache.capacity >= max_tokens]
        best = max(fitting, key=lambda prefix: prefix.common(prompt), default=None)
        if best is not None and self._is_worth(best, best.common(prompt)):
            return best
        return self._make(max_tokens) if len(self._kept) < self.most or not fitting else self._oldest(fitting)

    def _is_worth(self, prefix: Prefix, common: int) -> bool:
        goes_on = common and common >= prefix.prompt_length - ENDING
        return self.most < 2 or bool(goes_on) or 2 * common >= len(prefix.tokens)

    def _make(self, max_tokens: int) -> Prefix:
        """A new cache, in the place of the oldest ones where those are too many or too large together."""
        capacity = min(self.pair.max_context, -(-max_tokens // BLOCK) * BLOCK)
        while self._kept and (len(self._kept) >= max(self.most, 1) or self._positions + capacity > self._limit):
            self._kept.remove(self._oldest(self._kept))
        prefix = Prefix(self.pair.new_cache(capacity))
        self._kept.append(prefix)
        return prefix

    @staticmethod
    def _oldest(prefixes: Sequence[Prefix]) -> Prefix:
        return min(prefixes, key=lambda prefix: prefix.turn)

    @property
    def _positions(self) -> int:
        return sum(prefix.cache.capacity for prefix in self._kept)

    @property
    def _limit(self) -> float:
        return float("inf") if self.most_positions is None else self.most_positions
