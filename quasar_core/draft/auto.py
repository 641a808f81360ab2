"""Several drafters as one."""

from collections.abc import Sequence

from quasar_core.draft.acceptance import Acceptance
from quasar_core.draft.base import NO_DRAFT, Draft, Drafter

SHORTEST_ODDS = 0.02  # of a draft that is this unlikely to hold to its end, more would be read by nobody


class AutoDrafter(Drafter):
    """Takes the draft of the most expected tokens, and lets the others fill what it leaves free.

    Tokens are expected as often as those of their source and sureness have been right, so a drafter that does not pay
    in a text is overtaken by one that does within a few steps; of equal ones the first is taken.
    """

    def __init__(self, drafters: Sequence[Drafter], acceptance: Acceptance) -> None:
        self.drafters, self.acceptance = tuple(drafters), acceptance
        self.wants_best = max((drafter.wants_best for drafter in drafters), default=0)

    def observe(self, tokens: Sequence[int]) -> None:
        """Each drafter follows the text."""
        for drafter in self.drafters:
            drafter.observe(tokens)

    def forget(self, count: int) -> None:
        """Each drafter takes the tokens back."""
        for drafter in self.drafters:
            drafter.forget(count)

    def alternatives(self, draft: Sequence[int]) -> list[list[int]]:
        """The alternatives of the first drafter that knows some."""
        found = (drafter.alternatives(draft) for drafter in self.drafters)
        return next((rows for rows in found if rows), [])

    def see(self, tokens: Sequence[int], best: Sequence[Sequence[int]], start: int) -> None:
        """Each drafter that wants them is told as many successors as it asked for."""
        for drafter in self.drafters:
            if drafter.wants_best:
                drafter.see(tokens, [row[: drafter.wants_best] for row in best], start)

    def propose(self, limit: int, after: Sequence[int] = ()) -> Draft:
        """The best draft, another behind where that ends, and so on."""
        draft = NO_DRAFT
        while len(draft.tokens) < limit and self._odds(draft) > SHORTEST_ODDS:
            known = (*after, *draft.tokens)
            proposed = [drafter.propose(limit - len(draft.tokens), known) for drafter in self.drafters]
            best = max(proposed, key=self._expected, default=NO_DRAFT)
            if not best.tokens:
                break
            draft = draft.then(best)
        return draft

    def _expected(self, draft: Draft) -> float:
        """How many of a draft's tokens will be right."""
        odds, expected = 1.0, 0.0
        for acceptance in self.acceptance.of(draft):
            odds *= acceptance
            expected += odds
        return expected

    def _odds(self, draft: Draft) -> float:
        """That all of a draft is right."""
        odds = 1.0
        for acceptance in self.acceptance.of(draft):
            odds *= acceptance
        return odds
