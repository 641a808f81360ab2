"""Tables of rotary embeddings as the C++ pass reads them: their addresses, for the positions of a pass."""

from collections.abc import Sequence

import torch

from quasar_core.models.rope import RopeTables


class Tables:
    """Cosines and sines of a rotary embedding in float32; they are kept, as Python is slow after every pass."""

    def __init__(self, rope: RopeTables) -> None:
        self.rope = rope
        self._reach = 0  # positions in the tables

    def rows(self, start: int, end: int, prompt_length: int, depths: Sequence[int] | None = None) -> tuple[int, int]:
        """Addresses of cosines and sines [T, D] of these positions, or of those that stand so deep below the first."""
        if self.rope.stretches_at(end, prompt_length):
            self._stretched = self._widened(start, end, prompt_length)
            (cos, sin), first = self._stretched, 0
        else:
            (cos, sin), first = self._up_to(end), start
        if depths is not None:
            places = first + torch.tensor(depths)
            self._branched = cos, sin = cos[places].contiguous(), sin[places].contiguous()
            first = 0
        before = first * cos.shape[-1] * cos.element_size()
        return cos.data_ptr() + before, sin.data_ptr() + before

    def _up_to(self, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of all positions before `end`, at least."""
        if end > self._reach:
            further = 2 * end
            self._reach = end if self.rope.stretches_at(further) else further
            self._kept = self._widened(0, self._reach)
        return self._kept

    def _widened(self, start: int, end: int, prompt_length: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.rope.rows(start, end, prompt_length)
        return cos.float().contiguous(), sin.float().contiguous()
