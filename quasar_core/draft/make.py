"""Make the drafter that `--draft` names."""

from quasar_core.config import GenerationConfig
from quasar_core.draft.base import Drafter
from quasar_core.draft.ngram import NgramDrafter
from quasar_core.draft.none import NoDrafter


def make_drafter(config: GenerationConfig) -> Drafter:
    """A new drafter, that has read nothing."""
    if config.draft == "none":
        return NoDrafter()
    return NgramDrafter(config.ngram_min, config.ngram_max)
