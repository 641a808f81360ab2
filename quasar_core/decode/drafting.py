"""What a generator drafts from: the drafter of each answer, and what outlives it."""

from collections.abc import Sequence

from quasar_core.config import GenerationConfig, Request
from quasar_core.decode.draft_texts import read_index
from quasar_core.decode.text import encode_text
from quasar_core.draft.automaton import SuffixAutomaton
from quasar_core.draft.base import Drafter
from quasar_core.draft.make import Sources, make_drafter
from quasar_core.draft.memory import remember
from quasar_core.draft.recycle import Successors
from quasar_core.models.pair import Pair
from quasar_core.records import Progress, no_progress


class Drafting:
    """Makes a drafter for each answer. With `auto`, later answers draft from earlier ones of the same generator.

    While sampling they do not: what is drawn depends on the drafts, and a seed is to fix the text.
    """

    def __init__(self, pair: Pair, config: GenerationConfig, progress: Progress = no_progress) -> None:
        self.pair, self.config = pair, config
        self.sources = Sources()
        if config.draft == "none":
            return
        if config.draft == "auto" and config.sampling.greedy:
            self.sources.memory = SuffixAutomaton()
        if config.draft == "recycle" and config.sampling.greedy:
            self.sources.successors = Successors()
        if config.draft_from:
            self.sources.texts, note = read_index(config.draft_from, pair.tokenizer, progress)
            if note not in pair.notes:
                pair.notes.append(note)

    def begin(self, request: Request) -> Drafter:
        """The drafter of an answer."""
        expected = encode_text(self.pair.tokenizer, request.prediction) if request.prediction else []
        return make_drafter(self.config, self.sources, expected)

    def end(self, answer: Sequence[int]) -> None:
        """An answer is whole."""
        if self.sources.memory is not None:
            remember(self.sources.memory, answer)
