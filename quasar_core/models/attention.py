"""Grouped-query attention of one pass over a cache.

Letters: T tokens of the pass, L positions that it sees, H key-value heads, G query heads per key-value head, D head
size.
"""

from dataclasses import dataclass

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

# Up to here the query heads of a group are rows of one product, so that keys and values are read once for all of them.
FOLDED_TOKENS = 32


@dataclass(frozen=True)
class Sight:
    """Which positions the tokens of a pass see: from `first` to `end`, less what the mask takes away."""

    first: int
    end: int
    causal: bool  # a prompt from position 0, which needs no mask
    mask: torch.Tensor | None  # [T, L], or [T·G, L] for folded groups: 0 or −∞, added to the scores


def sight(start: int, count: int, window: int | None, group: int, device: torch.device, dtype: torch.dtype) -> Sight:
    """For `count` tokens at position `start`; a window counts the token's own position."""
    end = start + count
    first = 0 if window is None else max(0, start - window + 1)
    if count == 1:
        return Sight(first, end, causal=False, mask=None)
    if start == 0 and (window is None or count <= window):
        return Sight(first, end, causal=True, mask=None)
    if device.type == "cuda" and window is None and count > FOLDED_TOKENS:
        # A later chunk of a prompt. Flash attention takes no tensor for a mask, but it takes "causal, and the last
        # query sees the last key", which is what this one says.
        return Sight(0, end, causal=False, mask=causal_lower_right(count, end))
    own = torch.arange(start, end, device=device)[:, None]
    seen = torch.arange(first, end, device=device)
    hidden = seen > own
    if window is not None:
        hidden |= seen <= own - window
    mask = torch.zeros(hidden.shape, device=device, dtype=dtype).masked_fill_(hidden, -torch.inf)
    return Sight(first, end, causal=False, mask=mask.repeat_interleave(group, 0) if count <= FOLDED_TOKENS else mask)


def attend(queries: torch.Tensor, states: torch.Tensor, sight: Sight) -> torch.Tensor:
    """Queries [T, H·G, D] over a layer's keys and values [2, H, capacity, D] → [T, H·G·D]."""
    keys, values = states[:, None, :, sight.first : sight.end].unbind()
    count, heads, size = queries.shape
    if sight.causal or count > FOLDED_TOKENS:
        mixed = scaled_dot_product_attention(
            queries.transpose(0, 1)[None],
            keys,
            values,
            attn_mask=sight.mask,
            is_causal=sight.causal,
            enable_gqa=heads != keys.shape[1],
        )
        return mixed[0].transpose(0, 1).reshape(count, -1)
    groups = queries.view(count, keys.shape[1], -1, size)  # [T, H, G, D]
    rows = groups.transpose(0, 1).reshape(1, keys.shape[1], -1, size)  # [1, H, T·G, D]
    mixed = scaled_dot_product_attention(rows, keys, values, attn_mask=sight.mask)
    return mixed.view(keys.shape[1], count, -1, size).transpose(0, 1).reshape(count, -1)
