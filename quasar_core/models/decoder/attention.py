"""Attention of a pass over the cache in PyTorch's operations: what each token sees, and the mix of what it sees.

Letters: T tokens of a pass, L positions that it sees, H key-value heads, G query heads per key-value head, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from quasar_core.kernels.cpu.causal_attention import attends, causal_attention
from quasar_core.models.base import depths_of

# Up to here the query heads of a group are rows of one product, so that keys and values are read once for all of them.
FOLDED_TOKENS = 32


@dataclass(frozen=True)
class AttentionMask:
    """Which positions the tokens of a pass attend to: from `first` to `end`, less what `added` takes away."""

    first: int
    end: int
    causal: bool  # a prompt from position 0, which needs no mask
    added: torch.Tensor | None  # to the scores: 0 or −∞, [T, L], or [T·G, L] for folded groups
    continues: bool = False  # causal where the last token sees the last position, as of a prompt's later chunk
    in_cpp: bool = False  # the same, in C++
    window: int | None = None  # positions that a token sees, in C++


def make_mask(
    start: int,
    count: int,
    window: int | None,
    group: int,
    device: torch.device,
    dtype: torch.dtype,
    sinks: int = 0,
    size: int = 0,
) -> AttentionMask:
    """Make the mask of `count` tokens at position `start`; a window counts the token's own position.

    Beside a window the text's first `sinks` positions are seen. Heads of `size` numbers may be attended to in C++.
    """
    end = start + count
    first = 0 if window is None or sinks else max(0, start - window + 1)
    if count == 1 and (not sinks or window is None or start < window):
        return AttentionMask(first, end, causal=False, added=None)
    within = window is None or end <= window
    if count > FOLDED_TOKENS and (not sinks or within) and size and attends(device, dtype, size):
        return AttentionMask(first, end, causal=False, added=None, in_cpp=True, window=None if within else window)
    if start == 0 and within:
        return AttentionMask(first, end, causal=True, added=None)
    if device.type == "cuda" and window is None and count > FOLDED_TOKENS:
        return AttentionMask(0, end, causal=False, added=None, continues=True)
    own = torch.arange(start, end, device=device)[:, None]
    seen = torch.arange(first, end, device=device)
    hidden = seen > own
    if window is not None:
        hidden |= (seen <= own - window) & (seen >= sinks)
    added = torch.zeros(hidden.shape, device=device, dtype=dtype).masked_fill_(hidden, -torch.inf)
    return AttentionMask(
        first, end, causal=False, added=added.repeat_interleave(group, 0) if count <= FOLDED_TOKENS else added
    )


def make_tree_mask(
    start: int,
    parents: Sequence[int],
    window: int | None,
    group: int,
    device: torch.device,
    dtype: torch.dtype,
    sinks: int = 0,
) -> AttentionMask:
    """Make the mask of a tree whose nodes lie from `start` on: each sees what is before, its ancestors and itself."""
    count = len(parents)
    depths = torch.tensor(depths_of(parents), device=device)
    family = torch.eye(count, dtype=torch.bool, device=device)
    for node, parent in enumerate(parents):
        if parent >= 0:
            family[node] |= family[parent]
    own = start + depths[:, None]
    places = torch.cat((torch.arange(start, device=device), start + depths))
    hidden = torch.cat((family.new_zeros(count, start), ~family), dim=1)
    if window is not None:
        hidden |= (places <= own - window) & (places >= sinks)
    added = torch.zeros(hidden.shape, device=device, dtype=dtype).masked_fill_(hidden, -torch.inf)
    return AttentionMask(
        0, start + count, causal=False, added=added.repeat_interleave(group, 0) if count <= FOLDED_TOKENS else added
    )


def attend(
    queries: torch.Tensor,
    states: torch.Tensor,
    mask: AttentionMask,
    scale: float | None = None,
    cap: float | None = None,
) -> torch.Tensor:
    """Queries [T, H·G, D] over a layer's keys and values [2, H, capacity, D] → [T, H·G·D].

    Scores are multiplied by `scale`, 1 ÷ √D by default, and then held below a soft `cap`, where there is one.
    """
    keys, values = states[:, None, :, mask.first : mask.end].unbind()
    count, heads, size = queries.shape
    if mask.in_cpp:
        rows = queries.transpose(0, 1)[None]
        mixed = causal_attention(rows, keys, values, scale or size**-0.5, mask.window, cap)
        return mixed[0].transpose(0, 1).reshape(count, -1)
    if cap is not None:
        return _attend_capped(queries, states, mask, scale or size**-0.5, cap)
    if mask.causal or count > FOLDED_TOKENS:
        mixed = scaled_dot_product_attention(
            queries.transpose(0, 1)[None],
            keys,
            values,
            attn_mask=_lower_right(count, mask.end) if mask.continues else mask.added,
            is_causal=mask.causal,
            scale=scale,
            enable_gqa=heads != keys.shape[1],
        )
        return mixed[0].transpose(0, 1).reshape(count, -1)
    groups = queries.view(count, keys.shape[1], -1, size)  # [T, H, G, D]
    rows = groups.transpose(0, 1).reshape(1, keys.shape[1], -1, size)  # [1, H, T·G, D]
    mixed = scaled_dot_product_attention(rows, keys, values, attn_mask=mask.added, scale=scale)
    return mixed.view(keys.shape[1], count, -1, size).transpose(0, 1).reshape(count, -1)


def _lower_right(count: int, end: int) -> torch.Tensor:
    """The mask of a later chunk: flash attention takes no tensor for one, but it takes what this one says."""
    from torch.nn.attention.bias import causal_lower_right  # brings PyTorch's compiler, which takes a second

    return causal_lower_right(count, end)


def _attend_capped(
    queries: torch.Tensor, states: torch.Tensor, mask: AttentionMask, scale: float, cap: float
) -> torch.Tensor:
    """Attend with scores of cap · tanh(score ÷ cap), which no fused kernel of PyTorch's has (Gemma 2)."""
    keys, values = states[:, :, mask.first : mask.end].unbind()
    count, _, size = queries.shape
    groups = queries.view(count, keys.shape[0], -1, size)
    rows = groups.transpose(0, 1).reshape(keys.shape[0], -1, size)  # [H, T·G, D]
    scores = (rows @ keys.mT).float() * scale
    scores = cap * torch.tanh(scores / cap)
    scores = _hidden_left_out(scores, mask, groups.shape[2])
    mixed = scores.softmax(-1).to(values.dtype) @ values
    return mixed.view(keys.shape[0], count, -1, size).transpose(0, 1).reshape(count, -1)


def _hidden_left_out(scores: torch.Tensor, mask: AttentionMask, group: int) -> torch.Tensor:
    """Scores [H, T·G, L] with −∞ where a token does not see a position."""
    if mask.causal or mask.continues:
        count, end = scores.shape[1] // group, scores.shape[2]
        seen = torch.ones(count, end, dtype=torch.bool, device=scores.device).tril(end - count)
        return scores.masked_fill(~seen.repeat_interleave(group, 0), -torch.inf)
    if mask.added is None:
        return scores
    added = mask.added if len(mask.added) == scores.shape[1] else mask.added.repeat_interleave(group, 0)
    return scores.masked_fill(~added, -torch.inf) if added.dtype == torch.bool else scores + added
