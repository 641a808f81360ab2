"""What a generator drafts from: the drafter of each answer, and what outlives it."""

from collections.abc import Sequence
from dataclasses import replace

from quasar_core.config import GenerationConfig, Request
from quasar_core.decode.draft_memory import keep_answers, memory_file, recall_answers
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

    While sampling they do not, unless answers are kept for later runs: what is drawn depends on the drafts, and a seed
    is to fix the text.
    """

    def __init__(self, pair: Pair, config: GenerationConfig, progress: Progress = no_progress) -> None:
        self.pair, self.config = pair, config
        self.sources = Sources()
        if config.draft == "none":
            return
        if config.draft_memory or (config.draft == "auto" and config.sampling.greedy):
            self.sources.memory = SuffixAutomaton()
            self.sources.memory.extend(self._recall() if config.draft_memory else ())
        if config.draft == "recycle" and config.sampling.greedy:
            self.sources.successors = Successors()
        if config.draft_from:
            self.sources.texts, note = read_index(config.draft_from, pair.tokenizer, progress)
            if note not in pair.notes:
                pair.notes.append(note)

    def begin(self, request: Request) -> Drafter:
        """The drafter of an answer."""
        expected = encode_text(self.pair.tokenizer, request.prediction) if request.prediction else []
        sources = replace(self.sources, memory=None) if request.alone else self.sources
        return make_drafter(self.config, sources, expected)

    def end(self, answer: Sequence[int]) -> None:
        """An answer is whole."""
        if self.sources.memory is None:
            return
        remember(self.sources.memory, answer)
        if self.config.draft_memory:
            trouble = keep_answers(self._kept_in, self.sources.memory.text)
            if trouble and trouble not in self.pair.notes:
                self.pair.notes.append(trouble)

    def _recall(self) -> list[int]:
        """The answers of earlier runs; a note says how many tokens, or why there are none."""
        self._kept_in = memory_file(self.pair.tokenizer)
        tokens, note = recall_answers(self._kept_in)
        if note not in self.pair.notes:
            self.pair.notes.append(note)
        return tokens
