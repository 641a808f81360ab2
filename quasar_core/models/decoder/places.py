"""Where a pass stands in a text, and what follows from it: rotations, how queries grow, what each layer sees.

Letters: T tokens of a pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quasar_core.models.base import depths_of
from quasar_core.models.config.decoder import DecoderConfig
from quasar_core.models.decoder.attention import AttentionMask, make_mask, make_tree_mask
from quasar_core.models.rope import RopeTables, query_growth


@dataclass(frozen=True)
class Place:
    """Where a pass stands: its positions, their rotations, how queries grow, and what each kind of layer sees."""

    start: int
    end: int
    tables: list[tuple[torch.Tensor, torch.Tensor]]  # cosines and sines of each rotary embedding
    growth: torch.Tensor | None  # [T, 1, 1]
    masks: dict[tuple[int | None, int, int, int], AttentionMask]  # by window, sinks, key-value heads and their size


class Places:
    """Makes the places of a model's passes, in its dtype and on its device."""

    def __init__(
        self, config: DecoderConfig, ropes: Sequence[RopeTables], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._config, self._ropes, self._device, self._dtype = config, ropes, device, dtype
        self._mask_kinds = {
            (one.window, one.sinks, one.kv_heads, one.head_size) for one in config.blocks if one.recurrence is None
        }

    def place(self, start: int, count: int, prompt_length: int, parents: Sequence[int] | None = None) -> Place:
        """The place of `count` tokens from position `start`, or of a tree's nodes, by their `parents`.

        `prompt_length` is what rotations that depend on a text's length go by.
        """
        depths = torch.arange(count) if parents is None else torch.tensor(depths_of(parents))
        end = start + int(depths.max()) + 1
        tables = [rope.rows(start, end, prompt_length) for rope in self._ropes]
        if parents is not None:
            tables = [(cos[depths], sin[depths]) for cos, sin in tables]
        masks = self._masks(start, count, parents)
        return Place(start, start + count, tables, self._growth(start + depths), masks)

    def _growth(self, positions: torch.Tensor) -> torch.Tensor | None:
        """By how much queries grow at these positions [T]; None where they do not."""
        if not self._config.query_growth:
            return None
        growth = query_growth(positions.to(self._device), *self._config.query_growth)
        return growth[:, None, None].to(self._dtype)

    def _masks(
        self, start: int, count: int, parents: Sequence[int] | None
    ) -> dict[tuple[int | None, int, int, int], AttentionMask]:
        masks = dict[tuple[int | None, int, int, int], AttentionMask]()
        for window, sinks, heads, size in self._mask_kinds:
            group = self._config.num_heads // heads
            masks[window, sinks, heads, size] = (
                make_mask(start, count, window, group, self._device, self._dtype, sinks, size)
                if parents is None
                else make_tree_mask(start, parents, window, group, self._device, self._dtype, sinks)
            )
        return masks
