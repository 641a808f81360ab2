"""Many texts through the lean decoder at once: a pass takes a token of each, and they share its products.

All texts stand at the same position, so one rotation serves them all, and no mask is needed: a text sees its own keys
and values alone. Letters: B texts (rows), L positions that each sees, H key-value heads, G query heads per key-value
head, D head size, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from quasar_core.errors import QuasarError
from quasar_core.models.config.block import BlockConfig
from quasar_core.models.decoder.layer import DecoderLayer
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.rope import query_growth

Tables = tuple[torch.Tensor, torch.Tensor]
# As `attend_rows`: queries, states, first, end, scale, cap.
Attend = Callable[[torch.Tensor, torch.Tensor, int, int, float | None, float | None], torch.Tensor]


# Positions by which the cache grows. Products read it from end to end: where a part of it were read, PyTorch would copy
# that part for every product, at more than the product's own cost.
GROWTH = 32


class RowsCache:
    """Keys and values of B texts; a layer is one tensor [2, B, H, room, D], keys before values.

    The room grows with the texts, up to the capacity, or is `whole` from the beginning, for whoever reads no more of it
    than is written.
    """

    def __init__(
        self,
        blocks: Sequence[BlockConfig],
        rows: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        whole: bool = False,
    ) -> None:
        room = capacity if whole else 0
        self._made = {
            index: torch.empty(2, rows, block.kv_heads, room, block.head_size, device=device, dtype=dtype)
            for index, block in enumerate(blocks)
            if block.states_of == index
        }
        self._blocks = blocks
        self.length, self.capacity = 0, capacity
        self.hidden: torch.Tensor | None = None  # [B, in] behind the last block, of the last pass

    @property
    def layers(self) -> list[torch.Tensor]:
        """The tensor of each layer; some may share one."""
        return [self._made[block.states_of] for block in self._blocks]

    def make_room(self, count: int) -> None:
        """Make room for so many more positions; QuasarError beyond the capacity."""
        end = self.length + count
        if end > self.capacity:
            raise QuasarError(f"The cache holds {self.capacity} tokens of a text, and {end} are needed.")
        for index, old in self._made.items():
            if end > old.shape[3]:
                room = min(-(-end // GROWTH) * GROWTH, self.capacity)
                new = old.new_zeros(*old.shape[:3], room, old.shape[4])  # what is masked is multiplied by 0
                new[:, :, :, : self.length] = old[:, :, :, : self.length]
                self._made[index] = new

    def rollback(self, length: int) -> None:
        """Forget the positions from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot move a cache of {self.length} positions to {length}")
        self.length = length

    def states(self, begin: int, end: int) -> dict[str, torch.Tensor]:
        """Keys and values of these positions, by layer, [2, B, H, end − begin, D] each."""
        return {f"layer.{index}": layer[:, :, :, begin:end] for index, layer in self._made.items()}

    def append(self, states: Mapping[str, torch.Tensor]) -> None:
        """Take in what `states` gave of the positions that come next."""
        count = next(iter(states.values())).shape[3]
        self.make_room(count)
        for index, layer in self._made.items():
            layer[:, :, :, self.length : self.length + count] = states[f"layer.{index}"]
        self.length += count


def text_bytes(blocks: Sequence[BlockConfig], length: int, element: int) -> int:
    """Bytes of a text's keys and values, of so many bytes a number."""
    own = (block for index, block in enumerate(blocks) if block.states_of == index)
    return sum(2 * block.kv_heads * block.head_size for block in own) * length * element


@torch.inference_mode()
def pass_rows(
    decoder: LeanDecoder, tokens: torch.Tensor, cache: RowsCache, attend: Attend | None = None
) -> torch.Tensor:
    """Pass the next token of each text, [B] → float32 logits [B, V]; no layer may be recurrent.

    `attend` computes what `attend_rows` does, in its place.
    """
    config, place = decoder.config, cache.length
    cache.make_room(1)
    tables = [rope.rows(place, place + 1) for rope in decoder.ropes]
    growth = None
    if config.query_growth:
        position = torch.tensor([[[place]]], device=decoder.device)
        growth = query_growth(position, *config.query_growth).to(decoder.dtype)
    hidden, inputs = decoder.embed(tokens)
    for layer, states, given in zip(decoder.layers, cache.layers, inputs, strict=True):

        def mix(x: torch.Tensor, layer: DecoderLayer = layer, states: torch.Tensor = states) -> torch.Tensor:
            own = None if layer.shape.rope is None else tables[layer.shape.rope]
            return _attention(decoder, layer, x, states, place, own, growth, attend or attend_rows)

        decoder.run_block(layer, hidden, given, mix)
    cache.length, cache.hidden = cache.length + 1, hidden
    return decoder.head_logits(hidden)


def _attention(
    decoder: LeanDecoder,
    layer: DecoderLayer,
    x: torch.Tensor,
    states: torch.Tensor,
    place: int,
    tables: Tables | None,
    growth: torch.Tensor | None,
    attend: Attend,
) -> torch.Tensor:
    """Write the texts' keys and values at `place` into a layer's states, and attend over each text's own."""
    queries, keys, values, gates = decoder.project(layer, x, tables, growth)
    if keys is not None and values is not None:
        states[0, :, :, place], states[1, :, :, place] = keys, values
    first = 0 if layer.shape.window is None else max(0, place + 1 - layer.shape.window)
    config = decoder.config
    mixed = attend(queries, states, first, place + 1, config.scores_scale, config.scores_cap)
    return decoder.finish(layer, mixed, gates)


def attend_rows(
    queries: torch.Tensor, states: torch.Tensor, first: int, end: int, scale: float | None, cap: float | None
) -> torch.Tensor:
    """Queries [B, H·G, D] over each text's keys and values [2, B, H, room, D], from `first` to `end` → [B, H·G·D].

    Scores are multiplied by `scale`, 1 ÷ √D by default, and then held below a soft `cap`, where there is one.
    """
    keys, values = states.flatten(1, 2).unbind()  # [B·H, room, D]
    rows, heads = states.shape[1:3]
    groups = queries.reshape(rows * heads, -1, queries.shape[-1])  # [B·H, G, D]
    scores = torch.bmm(groups, keys.mT).float().mul_(scale or groups.shape[-1] ** -0.5)
    if cap is not None:
        scores = scores.div_(cap).tanh_().mul_(cap)
    scores[:, :, :first] = scores[:, :, end:] = -torch.inf
    return torch.bmm(scores.softmax(-1).to(values.dtype), values).view(rows, -1)
