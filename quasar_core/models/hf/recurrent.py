"""Models whose layers keep a state instead of keys and values: it cannot be moved back, so drafts have no place.

They generate plainly, one token a pass, as transformers does: `--verify full --draft none`.
"""

from pathlib import Path

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, DynamicCache, PretrainedConfig

from quasar_core.errors import QuasarError
from quasar_core.models.hf.skeleton import read_model_config

# Layers whose cache is keys and values by position, or nothing.
_BY_POSITION = {"full_attention", "sliding_attention", "chunked_attention", "dummy", "moe", "mlp"}


def recurrent_layers(config: PretrainedConfig) -> str | None:
    """What kind of layers keep a state that cannot be moved back; None where none do."""
    text = config.get_text_config()
    others = sorted(set(getattr(text, "layer_types", None) or ()) - _BY_POSITION)
    if others:
        return f"recurrent layers ({', '.join(map(str, others))})"
    for known in (config, text):
        model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(known), None)
        if getattr(model, "_is_stateful", False):
            return "recurrent layers"
    return None


def recurrent_layers_of(folder: Path, trust_remote_code: bool = False) -> str | None:
    """The same of a model's folder."""
    return recurrent_layers(read_model_config(folder, trust_remote_code))


def refuse_drafts(name: str, folder: Path, trust_remote_code: bool = False) -> None:
    """QuasarError, before any work, for a verifier or drafts where the model cannot go back."""
    kind = recurrent_layers_of(folder, trust_remote_code)
    if kind is not None:
        raise QuasarError(
            f"{name} has {kind}, whose state cannot be moved back to an earlier token, so neither a verifier nor "
            "drafts are of use to it: generate plainly, with --verify full --draft none."
        )


class RecurrentCache(DynamicCache):
    """Implements `models.base.KVCache` but for going back, other than to the beginning."""

    def __init__(self, config: PretrainedConfig, capacity: int) -> None:
        super().__init__(config=config)
        self._config, self.capacity, self.length = config, capacity, 0

    def rollback(self, length: int) -> None:
        """Stay, or begin anew; any other length is a defect of the caller."""
        if length == 0:
            self.layers = DynamicCache(config=self._config).layers
        elif length != self.length:
            raise ValueError(f"cannot move the state of {self.length} positions to {length}")
        self.length = length

    def make_room(self, count: int) -> None:
        """Refuse a pass that would not fit, and count it."""
        if self.length + count > self.capacity:
            raise QuasarError(f"The cache holds {self.capacity} tokens, and {self.length + count} are needed.")
        self.length += count
