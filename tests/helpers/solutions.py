"""Solved layers, compared but for ties."""

import pytest
import torch

from quasar_core.quantize.solve.gptq import Solution


def share_of_same(one: torch.Tensor, other: torch.Tensor) -> float:
    """The share of equal elements."""
    return (one == other).double().mean().item()


def assert_same_solution(one: Solution, other: Solution) -> None:
    """But for ties: a sum taken in another order decides them otherwise, which moves a few codes and hardly a loss."""
    assert one.loss == pytest.approx(other.loss, rel=0.01)
    assert one.relative_loss == pytest.approx(other.relative_loss, rel=0.01)
    for field in ("codes", "scales", "zeros"):
        assert share_of_same(getattr(one.weight, field), getattr(other.weight, field)) > 0.9, field
