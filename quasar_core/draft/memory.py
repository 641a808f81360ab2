"""Drafts from earlier answers of the same session."""

from collections.abc import Sequence

from quasar_core.draft.automaton import ROOT, SuffixAutomaton
from quasar_core.draft.base import Draft, Drafter
from quasar_core.draft.suffix import matched_draft

MOST_REMEMBERED = 65_536  # tokens; of more, the older half is forgotten


class MemoryDrafter(Drafter):
    """Finds the longest suffix of the text that an earlier answer held, and proposes what usually followed it there.

    As the global tree of SuffixDecoding (Oliaro et al., 2024). The memory does not grow while the text is followed.
    """

    def __init__(self, memory: SuffixAutomaton) -> None:
        self.memory = memory
        self._matches = [(ROOT, 0)]  # state and length of the match that ends at each token

    def observe(self, tokens: Sequence[int]) -> None:
        """Go on from the match of the last token to that of each new one."""
        if self.memory.text:
            for token in tokens:
                self._matches.append(self.memory.step(*self._matches[-1], token))

    def forget(self, count: int) -> None:
        """Go back to the match of an earlier token."""
        if self.memory.text:
            del self._matches[len(self._matches) - count :]

    def propose(self, limit: int, after: Sequence[int] = ()) -> Draft:
        """What usually followed the longest suffix of the text and `after`."""
        match = self._matches[-1]
        for token in after:
            match = self.memory.step(*match, token)
        return matched_draft(self.memory.follow(*match, limit), "memory")


def remember(memory: SuffixAutomaton, tokens: Sequence[int]) -> None:
    """Add an answer to a memory."""
    if len(memory.text) + len(tokens) > MOST_REMEMBERED:
        kept = [*memory.text, *tokens][-MOST_REMEMBERED // 2 :]
        memory.clear()
        memory.extend(kept)
    else:
        memory.extend(tokens)
