"""Caches for models that run through transformers: preallocated keys and values, or a recurrent state.

Rolling back moves a length. A layer that two models write is a layer of one buffer: whoever passed last wrote it.
A recurrent state cannot be moved back here, so such models take no drafts and no verifier. They generate plainly, one
token a pass, as transformers does: `--verify full --draft none`.
Letters: B batch (1 when generating), H key-value heads, D head size.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, DynamicCache, PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from quasar_core.errors import QuasarError
from quasar_core.models.decoder.two_tables import TwoBuffers
from quasar_core.models.hf.skeleton import read_model_config
from quasar_core.models.rope import PromptLength

# Layers whose cache is keys and values by position, or nothing.
_BY_POSITION = {"full_attention", "sliding_attention", "chunked_attention", "dummy", "moe", "mlp"}


class PreallocatedLayer(CacheLayerMixin):
    """Keys and values of one layer, [B, H, capacity, D]; allocated at the first write, when shapes are known."""

    is_sliding = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.length = capacity, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the buffers like the first keys and values."""
        for name, states in (("keys", key_states), ("values", value_states)):
            batch, heads, _, width = states.shape
            # Only what is written is ever read, so the system gives memory as the text grows.
            setattr(self, name, states.new_empty(batch, heads, self.capacity, width))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write T positions after the present length; views of all positions written so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query: Any) -> tuple[int, int]:
        """Key length and offset for a pass of T queries; older transformers give their positions instead of T."""
        count = query if isinstance(query, int) else query.shape[0]
        return self.length + count, 0

    def get_seq_length(self) -> int:
        """Positions written."""
        return self.length

    def get_max_length(self) -> int:
        """The capacity."""
        return self.capacity

    get_max_cache_shape = get_max_length


class PreallocatedCache(PromptLength, Cache):
    """One layer each for a model's decoder layers; implements `models.base.KVCache`."""

    def __init__(self, num_layers: int, capacity: int, limit: int | None = None) -> None:
        self.limit = limit
        self._layers = [PreallocatedLayer(capacity) for _ in range(num_layers)]
        super().__init__(layers=[*self._layers])
        self._capacity = capacity

    @property
    def length(self) -> int:
        """Positions written."""
        return self._layers[0].length

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return self._capacity

    @property
    def decoder_layers(self) -> list[PreallocatedLayer]:
        """Keys and values, layer by layer."""
        return self._layers

    def rollback(self, length: int) -> None:
        """Move the length back; a length ahead of what is written is a defect of the caller."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot move a cache of {self.length} positions to {length}")
        for layer in self._layers:
            layer.length = length

    def make_room(self, count: int) -> None:
        """Refuse a pass that would not fit."""
        if self.length + count > self.capacity:
            raise QuasarError(f"The cache holds {self.capacity} tokens, and {self.length + count} are needed.")


class TwoTableCache(TwoBuffers[PreallocatedCache]):
    """For a model that computes all keys anew where a text grows beyond a limit: the short texts' keys, and the long.

    The buffer in use is brought up to the text before a pass.
    """

    def __init__(self, num_layers: int, capacity: int, limit: int) -> None:
        short, long = (PreallocatedCache(num_layers, room) for room in (min(capacity, limit), capacity))
        super().__init__(short, long, limit)
        self.writer: Any = None  # the model that brings a buffer up to the text

    make_room = TwoBuffers.check_room

    def buffer_for(self, text_length: int) -> PreallocatedCache:
        """The keys of texts of that length."""
        return self._long if text_length > self.limit else self._short


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
    """What kind of recurrent layers the model of a folder has; None where it has none."""
    return recurrent_layers(read_model_config(folder, trust_remote_code))


# What classes call their cache; Mamba's changed its name in transformers 5.24.
_ARGUMENTS = ("past_key_values", "cache_params", "cache")


def cache_argument(model: type) -> str:
    """The name under which a class takes its cache; QuasarError where it has none, and would drop what it is given."""
    known = inspect.signature(model.forward).parameters  # type: ignore[attr-defined]
    found = next((name for name in _ARGUMENTS if name in known), None)
    if found is None:
        raise QuasarError(f"{model.__name__} takes no cache, as far as is known here, so it cannot generate.")
    return found


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
