"""Make the drafter that `--draft` names, from what outlives an answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from quasar_core.config import GenerationConfig
from quasar_core.draft.acceptance import Acceptance
from quasar_core.draft.auto import AutoDrafter
from quasar_core.draft.automaton import SuffixAutomaton
from quasar_core.draft.base import Drafter
from quasar_core.draft.by_model import Guesser, ModelDrafter, NoGuesser
from quasar_core.draft.memory import MemoryDrafter
from quasar_core.draft.ngram import NgramDrafter
from quasar_core.draft.none import NoDrafter
from quasar_core.draft.plugins import load_plugin
from quasar_core.draft.prediction import PredictionDrafter
from quasar_core.draft.recycle import RecycleDrafter, Successors
from quasar_core.draft.successors import KnownSuccessors, SuccessorsDrafter
from quasar_core.draft.suffix import SuffixDrafter
from quasar_core.draft.texts import TextIndex, TextsDrafter


@dataclass
class Sources:
    """What drafters draft from beside the text itself, and what is learned of them; all of it outlives an answer."""

    acceptance: Acceptance = field(default_factory=Acceptance)
    texts: TextIndex | None = None
    memory: SuffixAutomaton | None = None
    successors: Successors | None = None
    known: KnownSuccessors | None = None
    guesser: Guesser = field(default_factory=NoGuesser)


Make = Callable[[GenerationConfig, Sources], Drafter]
BY_NAME: dict[str, Make] = {
    "ngram": lambda config, sources: NgramDrafter(config.ngram_min, config.ngram_max),
    "suffix": lambda config, sources: SuffixDrafter(),
    "recycle": lambda config, sources: RecycleDrafter(sources.successors),
    "assistant": lambda config, sources: ModelDrafter("assistant", sources.guesser),
    "layer-skip": lambda config, sources: ModelDrafter("layer-skip", sources.guesser),
    "mtp": lambda config, sources: ModelDrafter("mtp", sources.guesser),
}
KNOWING = ("auto", "recycle")  # which begin with successors that are known
AUTO = ("suffix",)  # the drafters that need no other model; of equal drafts, that of the first is taken


def make_drafter(config: GenerationConfig, sources: Sources, expected: Sequence[int] = ()) -> Drafter:
    """A new drafter, that has read nothing: those that are named, and one for each further source that there is.

    `expected` are the tokens of the text that the user expects.
    """
    if config.draft == "none":
        return NoDrafter()
    drafters: list[Drafter] = [PredictionDrafter(expected)] if expected else []
    drafters += [_named(name, config, sources) for name in (AUTO if config.draft == "auto" else [config.draft])]
    if sources.known is not None and config.draft in KNOWING:
        drafters.append(SuccessorsDrafter(sources.known))
    if sources.texts is not None:
        drafters.append(TextsDrafter(sources.texts))
    if sources.memory is not None:
        drafters.append(MemoryDrafter(sources.memory))
    return drafters[0] if len(drafters) == 1 else AutoDrafter(drafters, sources.acceptance)


def _named(name: str, config: GenerationConfig, sources: Sources) -> Drafter:
    return BY_NAME[name](config, sources) if name in BY_NAME else load_plugin(name)
