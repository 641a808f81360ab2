"""Drafts of a checkpoint's head for multi-token prediction (MTP)."""

from collections.abc import Callable, Sequence

from quasar_core.models.base import NO_TOKEN
from quasar_core.models.decoder.cache import DecoderCache
from quasar_core.models.decoder.hidden_rows import HiddenRows, LastRow
from quasar_core.models.decoder.lean_decoder import LeanDecoder

CHUNK = 512  # tokens of a pass over a prompt
SHORT = 16  # tokens whose pass lists a choice for each


class NextTokenHead:
    """Multi-token prediction (DeepSeek-V3, 2024, §2.2; `models/drafting/mtp.py`), chained; implements `Guesser`.

    At position i it reads the model's row there and the token at i + 1, and keeps keys and values of its own block. The
    rows are those in the model's cache, of whoever passed a position last: of the model that verifies, and in `exact`
    the target's from its confirm on. They are at hand when a draft is due, and say what the checking model has just
    computed; the target's rows of a window would come only when it is settled. Where rows have been written anew, the
    block passes these positions anew, in the pass that the last of them takes anyway.

    Further tokens have no row of the model's: the head's own row of the token before stands there, behind the cache's
    length, where the next pass of the model writes over it.
    """

    def __init__(self, head: LeanDecoder, ratio: float, cache: Callable[[], DecoderCache]) -> None:
        self.head, self.ratio = head, ratio
        self._whole = cache
        self._of: DecoderCache | None = None
        self._passed: list[int] = []  # the token behind each position of its own cache

    def follow(self, text: Sequence[int], common: int) -> tuple[int, float]:
        """See `Guesser`. Nothing is guessed where several tokens have no row, as behind another drafter's."""
        whole = self._whole()
        rows = self._take_over(whole)
        behind, end = text[1:], len(text) - 1
        self._forget_from(min(self._common(behind, common - 1), rows.changed(self), max(end - 1, 0)))
        known = min(whole.length, end)
        if end < 1 or end - max(known, self._own.length) > 1:
            return NO_TOKEN, 0.0
        for stop in (known, end):
            if self._own.length < stop:
                found = self._pass(behind[self._own.length : stop])
                if whole.length <= stop < whole.capacity:
                    rows.values[stop] = self._last.value
        return found

    def _take_over(self, whole: DecoderCache) -> HiddenRows:
        """The rows of the model's cache; for another cache than before the head's own begins empty."""
        assert isinstance(whole.rows, HiddenRows)
        if self._of is not whole:
            self._own, self._of, self._passed = self.head.new_cache(whole.capacity), whole, []
            self._own.given = whole.rows.values
            assert isinstance(self._own.rows, LastRow)
            self._last = self._own.rows
        if self._own.prompt_length != whole.prompt_length:
            del self._passed[self._own.begin(whole.prompt_length) :]
        return whole.rows

    def _common(self, behind: Sequence[int], known: int) -> int:
        """How many of the tokens that were passed are still those of the text, the first `known` of which are."""
        most = min(len(self._passed), len(behind))
        count = min(max(known, 0), most)
        while count < most and self._passed[count] == behind[count]:
            count += 1
        return count

    def _forget_from(self, position: int) -> None:
        position = min(position, self._own.length)
        self._own.rollback(position)
        del self._passed[position:]

    def _pass(self, tokens: Sequence[int]) -> tuple[int, float]:
        """Go on with these tokens, whose rows are there → what follows the last of them, and its margin."""
        self._passed += tokens
        while len(tokens) > SHORT:
            piece = tokens[: min(CHUNK, len(tokens) - 1)]
            self.head.forward(piece, self._own, last_only=True)
            tokens = tokens[len(piece) :]
        choices = self.head.choose(tokens, self._own)
        return choices.tokens[-1], choices.margins[-1]
