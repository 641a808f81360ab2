"""Draft ahead of a target that another engine runs: the low-bit copy decodes, the engine's next pass confirms.

It is the loop of `exact` (`decode/engine.py`) without its target: tokens that the copy has verified wait in the window,
a draft may stand behind them, and both are the proposal that the engine's target checks.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from math import prod

from quasar_core.decode.logits.sampling import accept_matching
from quasar_core.decode.policy.agreement import Estimate
from quasar_core.decode.policy.checking import Checking
from quasar_core.decode.prefixes import BLOCK, Prefix
from quasar_core.draft.base import NO_DRAFT, Draft, Drafter
from quasar_core.models.base import NO_TOKEN, CausalLM
from quasar_core.models.pair import Pair
from quasar_core.models.rope import begin_text

CHUNK = 512  # tokens of a pass over a prompt
SHORT = 16  # tokens whose pass lists a choice for each


@dataclass
class Proposal:
    """Tokens offered to the target: the copy's window, and a draft behind it; `checking` decided on both."""

    checking: Checking
    window: list[int] = field(default_factory=list)
    draft: Draft = NO_DRAFT
    survival: float = 1.0  # P(the target agrees with the whole window)
    estimates: list[Estimate] = field(default_factory=list)
    drafts: list[tuple[int, Draft]] = field(default_factory=list)  # that the copy checked, and their places

    @property
    def tokens(self) -> list[int]:
        """All of it."""
        return [*self.window, *self.draft.tokens]

    def learn(self, new: Sequence[int], text: Sequence[int]) -> int:
        """The text went on with `new`, and is now `text`; what that tells. Returns how much of the window stands.

        An engine may check fewer tokens than were offered: of those behind its own last one nothing is known.
        """
        offered, window = self.tokens, len(self.window)
        right = _common(offered, new)
        known = right if right == len(new) else min(right + 1, len(offered))
        kept = min(right, window)
        tried = self.draft.first(known - window) if right >= window else NO_DRAFT
        self.checking.learn_drafts(self.drafts, text)
        self.checking.target_length.learn(tried, right - kept)
        self.checking.confirmed(self.estimates[:known], kept, len(new))
        return kept


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


class FreeCaches:
    """Caches that no text uses, at most `most`: a text that begins as one of them did passes only its rest."""

    def __init__(self, pair: Pair, most: int) -> None:
        self._pair, self._most = pair, most
        self._free: list[Prefix] = []

    def take(self, text: Sequence[int], positions: int) -> tuple[Prefix, int]:
        """A cache with room for so many positions, nobody else's, and how many of the text's tokens it holds."""
        fitting = [prefix for prefix in self._free if prefix.cache.capacity >= positions]
        best = max(fitting, key=lambda prefix: prefix.common(text), default=None)
        if best is None:
            return Prefix(self._pair.new_cache(min(self._pair.max_context, -(-positions // BLOCK) * BLOCK))), 0
        self._free.remove(best)
        common = best.common(text)
        best.cache.rollback(common)
        return best, begin_text(best.cache, len(text), common)

    def give(self, prefix: Prefix, tokens: list[int]) -> None:
        """The text that used it is over, or too long for it; the cache holds `tokens`."""
        prefix.tokens = tokens
        prefix.cache.rollback(len(tokens))
        self._free = [*self._free, prefix][-self._most :] if self._most else []


class CopyCache:
    """The copy with the cache of one text, which follows the text: tokens that it no longer holds are rolled back."""

    def __init__(self, model: CausalLM, free: FreeCaches) -> None:
        self._model, self._free = model, free
        self._prefix: Prefix | None = None
        self._passed = 0  # tokens of the text that the cache holds

    def keep_first(self, count: int) -> None:
        """The text differs behind `count` tokens."""
        self._passed = min(self._passed, count)

    def check(self, text: Sequence[int], draft: Sequence[int]) -> tuple[list[int], list[float], int, bool]:
        """One pass over what is new of the text and a draft.

        Returns the accepted tokens and the copy's own behind them, their margins, how many were drafted, and whether
        the pass was over the newest token and the draft alone.
        """
        cache = self._room(text, len(draft)).cache
        cache.rollback(self._passed)
        pending = list(text[self._passed :])
        while len(pending) > SHORT:
            piece = pending[: min(CHUNK, len(pending) - 1)]
            self._model.forward(piece, cache, last_only=True)
            pending = pending[len(piece) :]
        choices = self._model.choose([*pending, *draft], cache)
        first = len(pending) - 1
        accepted, bonus = accept_matching(choices.tokens[first:], draft)
        self._passed = len(text) + accepted
        new = [*draft[:accepted], bonus]
        return new, choices.margins[first : first + len(new)], accepted, len(pending) == 1

    def _room(self, text: Sequence[int], ahead: int) -> Prefix:
        needed = len(text) + ahead + 1
        if self._prefix is None or self._prefix.cache.capacity < needed:
            self.close(text)
            self._prefix, self._passed = self._free.take(text, needed)
        return self._prefix

    def close(self, text: Sequence[int]) -> None:
        """Leave the cache to a later text that begins as this one."""
        if self._prefix is not None:
            self._free.give(self._prefix, list(text[: self._passed]))
        self._prefix, self._passed = None, 0


class Ahead:
    """One text that another engine's target decides, and what is proposed for it."""

    def __init__(
        self,
        pair: Pair,
        caches: FreeCaches,
        drafter: Drafter,
        prompt: Sequence[int],
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        assert pair.verifier is not None
        self.tokens = list(prompt)
        self.proposal: Proposal | None = None
        self._ends, self._drafter, self._now = pair.eos_ids, drafter, now
        self._copy = CopyCache(pair.verifier, caches)
        drafter.observe(self.tokens)

    def follow(self, new: Sequence[int]) -> None:
        """The target went on with `new`: learn from it, and take back what it refused."""
        before, self.tokens = len(self.tokens), [*self.tokens, *new]
        proposal, self.proposal = self.proposal, None
        if proposal is None:
            self._drafter.observe(new)
            return
        kept = proposal.learn(new, self.tokens)
        self._copy.keep_first(min(before + kept, len(self.tokens) - 1))  # the newest token is to be passed
        self._drafter.forget(len(proposal.window) - kept)
        self._drafter.observe(new[kept:])

    def propose(self, limit: int, checking: Checking, with_copy: bool = True) -> list[int]:
        """At most `limit` tokens for the target's next pass; without the copy, a draft alone."""
        proposal = self.proposal = Proposal(checking)
        while len(proposal.window) < limit:
            start, room = self._now(), limit - len(proposal.window)
            offered = self._drafter.propose(min(checking.limit, room)) if checking.limit else NO_DRAFT
            if not with_copy:
                proposal.draft = checking.target_length.cut(offered)
                break
            check, draft = checking.choose(offered, len(proposal.window), proposal.survival)
            if check.by_target:
                proposal.draft = draft
                break
            if not self._verify(proposal, draft.first(room - 1), start):
                break
        return proposal.tokens

    def close(self) -> None:
        """The text ends here."""
        self._copy.close(self.tokens)

    def _verify(self, proposal: Proposal, draft: Draft, start: float) -> bool:
        """Let the copy check a draft; what it accepts and its own token join the window. Whether it may go on."""
        drafted, text = self._now(), [*self.tokens, *proposal.window]
        new, margins, accepted, is_whole = self._copy.check(text, draft.tokens)
        pass_s = self._now() - drafted
        if new[-1] == NO_TOKEN:
            return False
        proposal.drafts.append((len(text), draft))
        refused = accepted < len(draft.tokens)
        estimates = proposal.checking.agreement.estimates(margins, accepted, refused)
        proposal.estimates += estimates
        proposal.survival *= prod(estimate.p for estimate in estimates)
        proposal.window += new
        length = proposal.checking.verifier_length
        length.learn(draft, accepted, drafted - start, pass_s if is_whole else None)
        proposal.checking.verified()
        self._drafter.observe(new)
        return not self._ends.intersection(new)
