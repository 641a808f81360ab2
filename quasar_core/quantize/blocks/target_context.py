"""The target's keys and values in the verifier's attention, as in `exact`.

Target and verifier share one cache, and each confirm leaves the target's keys and values in it. So behind the last few
tokens the verifier reads those, and need not make good what errors of its own would do. Letters: B rows, H heads, L
tokens of a row, D of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

WINDOW = 8  # tokens that the verifier proposes between two confirms, or a few more


class TargetContext:
    """The keys and values of a block's attention: noted in a pass of the target, read in one of the verifier.

    A block whose attention is no `scaled_dot_product_attention` of its tokens to one another, as linear attention,
    leaves nothing here, and is read as though the verifier were alone.
    """

    def __init__(self) -> None:
        self.noted: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(self) -> TorchFunctionMode:
        """Inside it, a pass of the target leaves its keys and values here, in place of those of another."""
        return _Noting(self.noted)

    def read(self, first: int, step: int) -> TorchFunctionMode:
        """Inside it, attention of every `step`th row from `first` on reads them everywhere."""
        return _Reading(self.noted, slice(first, None, step))

    def read_in_windows(self) -> TorchFunctionMode:
        """Inside it, attention of every token reads them up to where its window of `WINDOW` tokens begins."""
        return _ReadingInWindows(self.noted)


class _Noting(TorchFunctionMode):
    def __init__(self, noted: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self._noted = noted

    def __enter__(self) -> Any:
        self._noted.clear()
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """What PyTorch calls in a function's place; the mode is off meanwhile."""
        if _is_self_attention(func, args):
            self._noted.append((args[1], args[2]))
        return func(*args, **(kwargs or {}))


class _Reading(TorchFunctionMode):
    def __init__(self, noted: list[tuple[torch.Tensor, torch.Tensor]], rows: slice = slice(None)) -> None:
        super().__init__()
        self._noted, self._rows, self._done = noted, rows, 0

    def __enter__(self) -> Any:
        self._done = 0
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """What PyTorch calls in a function's place; the mode is off meanwhile."""
        kwargs = kwargs or {}
        if not _is_self_attention(func, args) or self._done == len(self._noted):
            return func(*args, **kwargs)
        known = self._noted[self._done]
        self._done += 1
        return self._attend(args, known, **kwargs)

    def _attend(self, own: Sequence[torch.Tensor], known: Sequence[torch.Tensor], **options: Any) -> torch.Tensor:
        query, key, value = own[0], own[1].clone(), own[2].clone()
        key[self._rows], value[self._rows] = (tensor[self._rows] for tensor in known)
        return scaled_dot_product_attention(query, key, value, **options)


class _ReadingInWindows(_Reading):
    def _attend(self, own: Sequence[torch.Tensor], known: Sequence[torch.Tensor], **options: Any) -> torch.Tensor:
        return attend_in_windows(own, known, **options)


def _is_self_attention(func: Any, args: Sequence[Any]) -> bool:
    """Whether this is attention whose queries, keys and values are those of the same tokens, all else given by name."""
    if func is not scaled_dot_product_attention or len(args) != 3:
        return False
    return len({tensor.shape[-2] for tensor in args}) == 1


def attend_in_windows(
    own: Sequence[torch.Tensor],
    known: Sequence[torch.Tensor],
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    **options: Any,
) -> torch.Tensor:
    """Attention [B, H, L, D] of queries over their own window's keys, and over known ones behind it."""
    query, key, value = own
    position = torch.arange(query.shape[-2], device=query.device)
    inside = position >= (position - position % WINDOW)[:, None]
    if attn_mask is None:
        attn_mask = torch.ones_like(inside)
    if is_causal:
        attn_mask = attn_mask.tril()
    seen = torch.cat([_only(attn_mask, ~inside), _only(attn_mask, inside)], dim=-1)
    keys, values = torch.cat([known[0], key], dim=-2), torch.cat([known[1], value], dim=-2)
    return scaled_dot_product_attention(query, keys, values, attn_mask=seen, **options)


def _only(mask: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """A mask, of bools or of what is added to scores, of which only a part is seen."""
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)
