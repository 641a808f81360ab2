"""Logits of a short head, which has rows for some tokens only. Letters: T rows, R tokens of the head, V vocabulary."""

import math

import torch


def no_logits(rows: int, vocabulary: int, device: torch.device | None = None) -> torch.Tensor:
    """Logits [T, V] of tokens that cannot come."""
    return torch.full((rows, vocabulary), -math.inf, device=device)


def spread(logits: torch.Tensor, tokens: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Logits [T, R] of some tokens [R] → [T, V], in which the others are −∞."""
    return no_logits(len(logits), vocabulary, logits.device).index_copy_(1, tokens.long(), logits)
