"""Tables of rotary embeddings as the C++ pass reads them: their addresses, from a position on."""

import torch

from quasar_core.models.rope import RopeTables


class Tables:
    """Cosines and sines of a rotary embedding in float32; they are kept, as Python is slow after every pass."""

    def __init__(self, rope: RopeTables) -> None:
        self.rope = rope
        self._reach = 0  # positions in the tables that are kept
        self._kept = (0, 0, 0)

    def places(self, start: int, end: int, prompt_length: int) -> tuple[int, int]:
        """Addresses of cosines and sines [end − start, D], or more, from a position on."""
        if self.rope.stretches_at(end, prompt_length):
            self._stretched = self._widened(start, end, prompt_length)
            return _places(*self._stretched)[:2]
        if end > self._reach:
            further = 2 * end
            self._reach = end if self.rope.stretches_at(further) else further
            self._tables = self._widened(0, self._reach)
            self._kept = _places(*self._tables)
        cos, sin, size = self._kept
        return cos + start * size, sin + start * size

    def _widened(self, start: int, end: int, prompt_length: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.rope.rows(start, end, prompt_length)
        return cos.float().contiguous(), sin.float().contiguous()


def _places(cos: torch.Tensor, sin: torch.Tensor) -> tuple[int, int, int]:
    """Addresses of both, and the bytes of a row."""
    return cos.data_ptr(), sin.data_ptr(), cos.shape[-1] * cos.element_size()
