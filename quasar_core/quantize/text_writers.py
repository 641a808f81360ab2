"""Run the passes of a text that the model writes: by the lean decoder, or by transformers for other models.

Many rows are written at once, and march in step: a pass takes a token of each. Letters: B rows of a batch, L tokens of
a row, T positions of a part, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.decoder.prepacked import prepack
from quasar_core.models.decoder.rows import Attend, RowsCache, pass_rows, text_bytes
from quasar_core.models.hf.cache import PreallocatedCache, RecurrentCache, cache_argument, recurrent_layers
from quasar_core.quantize.solve import cpp

# Where nobody has asked what is free.
USUAL_ROOM = 500_000_000
# Of a row's logits: as the head gives them, in float32, and what drawing from them makes.
LOGIT_BYTES = 12
# Rows beyond which a token gets no cheaper: a step's products are then bound by arithmetic on every device.
MOST_ROWS = 256


def batch_rows(room: int, row_bytes: int, rows: int) -> int:
    """Count the rows of a batch: as many as there is room for, one at least, and in nearly equal batches."""
    most = min(max(1, room // row_bytes), MOST_ROWS, rows)
    return -(-rows // -(-rows // most))


class Rows(Protocol):
    """A batch that is being written; `hidden` [B, in] is what the last pass left behind the last block, if known."""

    hidden: torch.Tensor | None

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Pass the next token of each row, [B] → float32 logits [B, V]."""
        ...

    def states(self, begin: int, end: int) -> dict[str, torch.Tensor] | None:
        """What the passes of these positions have left, to be appended to a batch of the same rows; None: it cannot."""
        ...

    def append(self, states: Mapping[str, torch.Tensor]) -> None:
        """Take in what `states` gave of the positions that come next."""
        ...

    def rollback(self, length: int) -> None:
        """Forget the positions from `length` on."""
        ...


class Writer(Protocol):
    """A model as it writes text; `room` is how many bytes its rows may take, `knows_hidden` what its rows do."""

    room: int
    knows_hidden: bool

    @property
    def name(self) -> str:
        """What computes, in which dtype and where: what a text that is gone on with depends on."""
        ...

    @property
    def device(self) -> torch.device:
        """Where tokens go in."""
        ...

    @property
    def vocab_size(self) -> int:
        """V."""
        ...

    def row_bytes(self, length: int) -> int:
        """Count what a row of so many tokens takes."""
        ...

    def begin(self, rows: int, length: int) -> Rows:
        """Begin a batch of so many rows of at most `length` tokens."""
        ...


class LeanWriter:
    """The lean decoder, which is the writer's own from now on; no layer may be recurrent.

    `kind` tells a rounded copy from the model.
    """

    knows_hidden = True

    def __init__(self, decoder: LeanDecoder, room: int = USUAL_ROOM, kind: str = "") -> None:
        self.decoder, self.room, self._kind = decoder, room, kind
        prepack(decoder)

    @property
    def name(self) -> str:
        """See `Writer`."""
        attention = "" if self.attention is None else ", attention in C++"
        return f"lean {self._kind}{self.decoder.dtype} {self.decoder.device.type}{attention}"

    @property
    def attention(self) -> Attend | None:
        """Attention in C++; None where PyTorch's operations compute it."""
        whole = all(block.head_size % cpp.LANES == 0 for block in self.decoder.config.blocks)
        return cpp.attend_rows if whole and cpp.attends_rows(self.decoder.device, self.decoder.dtype) else None

    @property
    def device(self) -> torch.device:
        """See `Writer`."""
        return self.decoder.device

    @property
    def vocab_size(self) -> int:
        """See `Writer`."""
        return self.decoder.vocab_size

    def row_bytes(self, length: int) -> int:
        """See `Writer`."""
        states = text_bytes(self.decoder.config.blocks, length, self.decoder.dtype.itemsize)
        return states + LOGIT_BYTES * self.vocab_size

    def begin(self, rows: int, length: int) -> "LeanRows":
        """See `Writer`."""
        for rope in self.decoder.ropes:
            rope.reach(length)
        return LeanRows(self.decoder, rows, length, self.attention)


class LeanRows(RowsCache):
    """A batch of the lean decoder."""

    def __init__(self, decoder: LeanDecoder, rows: int, length: int, attend: Attend | None = None) -> None:
        whole = attend is not None  # C++ reads what is written
        super().__init__(decoder.config.blocks, rows, length, decoder.device, decoder.dtype, whole)
        self._decoder, self._attend = decoder, attend

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Rows`."""
        return pass_rows(self._decoder, tokens, self, self._attend)


class TransformersWriter:
    """Any model of transformers, in its own passes."""

    knows_hidden = False

    def __init__(self, model: PreTrainedModel, room: int = USUAL_ROOM) -> None:
        self.model, self.room = model, room

    @property
    def name(self) -> str:
        """See `Writer`."""
        return f"transformers {self.model.dtype} {self.device.type}"

    @property
    def device(self) -> torch.device:
        """See `Writer`."""
        return self.model.device

    @property
    def vocab_size(self) -> int:
        """See `Writer`."""
        return int(self.model.config.get_text_config().vocab_size)

    def row_bytes(self, length: int) -> int:
        """See `Writer`."""
        return token_bytes(self.model, self.model.dtype.itemsize) * length + LOGIT_BYTES * self.vocab_size

    def begin(self, rows: int, length: int) -> "TransformersRows":
        """See `Writer`; a model's cache takes as many rows as come."""
        return TransformersRows(self.model, length)


class TransformersRows:
    """A batch of a model of transformers.

    States of recurrent layers are too large to be kept every few seconds: such a batch is written at one go.
    """

    hidden: torch.Tensor | None = None

    def __init__(self, model: PreTrainedModel, length: int) -> None:
        self._model = model
        self._cache: PreallocatedCache | RecurrentCache
        if recurrent_layers(model.config):
            self._cache = RecurrentCache(model.config, length)
        else:
            self._cache = PreallocatedCache(model.config.get_text_config().num_hidden_layers, length)

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Rows`. For the last of several tokens, PyTorch's CPU product copies the head for every row."""
        options: dict[str, Any] = {cache_argument(type(self._model)): self._cache}
        output: Any = self._model(input_ids=tokens[:, None], use_cache=True, **options)
        return output.logits[:, -1].float()  # type: ignore[no-any-return]

    def states(self, begin: int, end: int) -> dict[str, torch.Tensor] | None:
        """See `Rows`."""
        if isinstance(self._cache, RecurrentCache):
            return None
        layers = [(index, layer) for index, layer in enumerate(self._cache.decoder_layers) if layer.is_initialized]
        return {
            f"{part}.{index}": getattr(layer, part)[:, :, begin:end]
            for index, layer in layers
            for part in ("keys", "values")
        }

    def append(self, states: Mapping[str, torch.Tensor]) -> None:
        """See `Rows`."""
        assert isinstance(self._cache, PreallocatedCache)
        for index, layer in enumerate(self._cache.decoder_layers):
            if f"keys.{index}" in states:
                keys, values = (states[f"{part}.{index}"].to(self._model.device) for part in ("keys", "values"))
                layer.update(keys, values)

    def rollback(self, length: int) -> None:
        """See `Rows`."""
        self._cache.rollback(length)


def token_bytes(model: PreTrainedModel, element: int) -> int:
    """Count the bytes of a token's keys and values in all layers, of so many bytes a number."""
    config = model.config.get_text_config()
    options = config.to_dict()  # of layers that differ, the config itself gives no number
    own = {int(index): given for index, given in (options.get("per_layer_config") or {}).items()}
    total = 0
    for index in range(config.num_hidden_layers):
        layer = {**options, **own.get(index, {})}
        heads = layer.get("num_key_value_heads") or config.num_attention_heads
        total += 2 * heads * (layer.get("head_dim") or config.hidden_size // config.num_attention_heads)
    return int(total * element)
