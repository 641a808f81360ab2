"""Self-speculation: the model that checks the drafts writes them too, with some of its blocks left out."""

from collections.abc import Callable, Sequence

from quasar_core.models.base import CausalLM
from quasar_core.models.decoder.cache import DecoderCache
from quasar_core.models.drafting.skipping import CacheView


class LayerSkip:
    """Draft & Verify (Zhang et al., 2024), with whole blocks left out; implements `Guesser`.

    It reads keys and values of the text where the whole model left them, so it has no prompt to pass, and writes its
    own behind them, where the pass that checks the draft writes next.
    """

    def __init__(self, model: CausalLM, kept: Sequence[int], ratio: float, cache: Callable[[], DecoderCache]) -> None:
        self.model, self.kept, self.ratio = model, kept, ratio
        self._whole = cache
        self._view: CacheView | None = None
        self._of: DecoderCache | None = None

    def follow(self, text: Sequence[int], common: int) -> tuple[int, float]:
        """See `Guesser`. The cache holds the text but for its last token; what was drafted since, the view holds."""
        whole = self._whole()
        if self._view is None or self._of is not whole:
            self._view, self._of = CacheView(whole, self.kept), whole
        known = max(min(common, len(text) - 1), whole.length)
        self._view.move(known)
        choices = self.model.choose(text[known:], self._view)
        return choices.tokens[-1], choices.margins[-1]
