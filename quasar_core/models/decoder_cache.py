"""Keys and values of the lean decoder: allocated once, rolled back by moving a length.

Letters: H key-value heads, D head size.
"""

import ctypes

import torch

from quasar_core.errors import QuasarError
from quasar_core.kernels.pages import empty_in_huge_pages
from quasar_core.models.text_length import PromptLength


class DecoderCache(PromptLength):
    """Implements `models.base.KVCache`; a layer is one tensor [2, H, capacity, D], keys before values.

    The positions of a head lie next to each other, so attention reads it from end to end.
    """

    def __init__(
        self, num_layers: int, num_heads: int, head_size: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (num_layers, 2, num_heads, capacity, head_size)
        self.layers = empty_in_huge_pages(*shape, device=device, dtype=dtype).unbind()
        self.addresses = (ctypes.c_void_p * num_layers)(*(states.data_ptr() for states in self.layers))
        self._length, self._capacity = 0, capacity

    @property
    def length(self) -> int:
        """Positions written."""
        return self._length

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return self._capacity

    def check_room(self, count: int) -> None:
        """Refuse a pass that would not fit."""
        if self._length + count > self._capacity:
            raise QuasarError(f"The cache holds {self._capacity} tokens, and {self._length + count} are needed.")

    def advance(self, count: int) -> None:
        """Count a finished pass of `count` positions."""
        self._length += count

    def rollback(self, length: int) -> None:
        """Move the length back; a length ahead of what is written is a defect of the caller."""
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot move a cache of {self._length} positions to {length}")
        self._length = length
