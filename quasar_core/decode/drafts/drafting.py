"""What a generator drafts from: the drafter of each answer, and what outlives it."""

from collections.abc import Sequence

from quasar_core.config import GenerationConfig, Request
from quasar_core.decode.drafts.draft_memory import keep_answers, memory_file, recall_answers
from quasar_core.decode.drafts.draft_texts import read_index
from quasar_core.decode.text import encode_text
from quasar_core.draft.automaton import SuffixAutomaton
from quasar_core.draft.base import Drafter
from quasar_core.draft.make import KNOWING, Sources, make_drafter
from quasar_core.draft.memory import remember
from quasar_core.draft.recycle import Successors
from quasar_core.draft.successor_file import read_successors
from quasar_core.draft.successors import KnownSuccessors
from quasar_core.errors import QuasarError
from quasar_core.models.pair import Pair
from quasar_core.records import Progress, no_progress


class Drafting:
    """Makes a drafter for each answer. With `auto`, later answers draft from earlier ones of the same generator."""

    def __init__(self, pair: Pair, config: GenerationConfig, progress: Progress = no_progress) -> None:
        self.pair, self.config = pair, config
        self.sources = Sources()
        if config.draft == "none":
            return
        if config.draft_memory or config.draft == "auto":
            self.sources.memory = SuffixAutomaton()
            self.sources.memory.extend(self._recall() if config.draft_memory else ())
        if config.draft == "recycle":
            self.sources.successors = Successors()
        if config.draft in KNOWING:
            self.sources.known = self._known_successors()
        if config.draft_from:
            self.sources.texts, note = read_index(config.draft_from, pair.tokenizer, progress)
            self._note(note)

    def begin(self, request: Request) -> Drafter:
        """The drafter of an answer."""
        expected = encode_text(self.pair.tokenizer, request.prediction) if request.prediction else []
        return make_drafter(self.config, self.sources, expected)

    def end(self, answer: Sequence[int]) -> None:
        """An answer is whole."""
        if self.sources.memory is None:
            return
        remember(self.sources.memory, answer)
        if self.config.draft_memory:
            trouble = keep_answers(self._kept_in, self.sources.memory.text)
            if trouble:
                self._note(trouble)

    def _known_successors(self) -> KnownSuccessors | None:
        """What quantizing counted; a note says how much, or why drafts begin with nothing."""
        folder = self.pair.successors_folder
        if folder is None:
            return None
        try:
            known = read_successors(folder, self.pair.primary.vocab_size)
        except QuasarError as error:
            self._note(f"drafts: begin without known successors: {error}".rstrip("."))
            return None
        if known is None:
            self._note("drafts: begin without known successors; `quasar quantize MODEL --successors` adds them")
        else:
            self._note(f"drafts: begin with the successors of {len(known):,} contexts, counted when quantizing")
        return known

    def _note(self, sentence: str) -> None:
        if sentence not in self.pair.notes:
            self.pair.notes.append(sentence)

    def _recall(self) -> list[int]:
        """The answers of earlier runs; a note says how many tokens, or why there are none."""
        self._kept_in = memory_file(self.pair.tokenizer)
        tokens, note = recall_answers(self._kept_in)
        self._note(note)
        return tokens
