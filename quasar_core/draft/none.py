"""Plain decoding: no draft."""

from collections.abc import Sequence

from quasar_core.draft.base import NO_DRAFT, Draft, Drafter


class NoDrafter(Drafter):
    """Proposes nothing."""

    def observe(self, tokens: Sequence[int]) -> None:
        """Nothing to remember."""

    def forget(self, count: int) -> None:
        """Nothing to forget."""

    def propose(self, limit: int, after: Sequence[int] = ()) -> Draft:
        """The empty draft."""
        return NO_DRAFT
