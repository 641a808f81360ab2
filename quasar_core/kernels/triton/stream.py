"""Norms without launches of their own: a product leaves what the next norm needs, the products behind it apply that.

x · w / √(mean square + eps) is a factor of each row, and a product's sums may be multiplied by it as well as its rows:
so the product before a norm stores the residual stream h, h · w, and sums of squares of its own blocks, and those that
read the norm multiply by h · w and their sums by the factor. h · w is rounded once, where a norm's rows are rounded
twice: logits differ in last bits from those of passes with norms. Letters: T rows of a pass, H the hidden size.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quasar_core.kernels.triton.language import overlap, wait


@dataclass(frozen=True)
class Stream:
    """The residual stream as products leave it for the next norm, which the products behind it apply to their sums."""

    hidden: torch.Tensor  # [T, H]
    scaled: torch.Tensor  # [T, H]: times the next norm's weight
    squares: torch.Tensor  # [T, S] float32: sums of squares of S parts of each row
    eps: float

    def rows(self, begin: int, end: int) -> "Stream":
        """Some of the rows, in place."""
        return Stream(self.hidden[begin:end], self.scaled[begin:end], self.squares[begin:end], self.eps)

    @property
    def reads(self) -> tuple[torch.Tensor, int, float, float]:
        """What a kernel is given of it: the sums, how many, what makes them a mean, and eps."""
        return self.squares, self.squares.shape[1], 1 / self.hidden.shape[1], self.eps


@dataclass(frozen=True)
class NextNorm:
    """The norm [H] behind a product, and where it leaves what that norm needs, as `Stream` has it."""

    weight: torch.Tensor
    scaled: torch.Tensor
    squares: torch.Tensor  # as many parts as the product has blocks of outputs

    @property
    def writes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a kernel is given of it."""
        return self.weight, self.scaled, self.squares


NOTHING_READ, NOTHING_WRITTEN = (None, 1, 1.0, 0.0), (None, None, None)


def begin_stream(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> Stream:
    """The stream of a pass's embeddings [T, H], before the first norm [H]."""
    stream = Stream(hidden, torch.empty_like(hidden), hidden.new_empty(len(hidden), 1, dtype=torch.float32), eps)
    block = triton.next_power_of_2(hidden.shape[1])
    _begin_kernel[(len(hidden),)](
        hidden,
        weight,
        stream.scaled,
        stream.squares,
        hidden.shape[1],
        SIZE=block,
        num_warps=min(max(block // 512, 1), 16),
        **overlap(),
    )
    return stream


@triton.jit
def _begin_kernel(hidden_ptr, weight_ptr, scaled_ptr, squares_ptr, size, SIZE: tl.constexpr, OVERLAPS: tl.constexpr):
    columns = tl.arange(0, SIZE)
    known = columns < size
    weight = tl.load(weight_ptr + columns, mask=known, other=0.0).to(tl.float32)
    wait(OVERLAPS)
    places = tl.program_id(0) * size + columns
    hidden = tl.load(hidden_ptr + places, mask=known, other=0.0).to(tl.float32)
    tl.store(scaled_ptr + places, (hidden * weight).to(scaled_ptr.dtype.element_ty), mask=known)
    tl.store(squares_ptr + tl.program_id(0), tl.sum(hidden * hidden, axis=0))
