"""Drafters by name."""

from quasar_core.config import GenerationConfig
from quasar_core.draft.base import Drafter, NoDrafter
from quasar_core.draft.ngram import NgramDrafter


def make_drafter(config: GenerationConfig) -> Drafter:
    """The drafter that `--draft` names."""
    if config.draft == "none":
        return NoDrafter()
    return NgramDrafter(config.ngram_min, config.ngram_max)
