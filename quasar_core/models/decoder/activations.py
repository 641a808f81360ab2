"""The MLP's activations in PyTorch's operations; the fast passes have kernels of the same."""

import torch
from torch.nn.functional import gelu, relu, silu, softplus


def activated(
    x: torch.Tensor, activation: str, gated: bool = True, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """x [T, 2·I], gates first → activation(gate) · the rest [T, I]; without gates, activation(x) [T, I]."""
    if not gated:
        return apply(x, activation, weights)
    gate, up = x.chunk(2, dim=-1)
    return apply(gate, activation, weights) * up


def apply(x: torch.Tensor, activation: str, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The activation of every element."""
    if activation == "silu":
        return silu(x)
    if activation == "gelu_tanh":
        return gelu(x, approximate="tanh")
    if activation == "relu2":
        return relu(x).square()
    assert weights is not None
    return _xielu(x, *weights)


def _xielu(
    x: torch.Tensor, above: torch.Tensor, below: torch.Tensor, slope: torch.Tensor, least: torch.Tensor
) -> torch.Tensor:
    """xIELU (Huang and Schlag, 2024, arXiv 2411.13010): the integral of an ELU, its curvatures learned."""
    low = (torch.expm1(torch.minimum(x, least)) - x) * below
    return torch.where(x > 0, above * x * x, low) + slope * x


def xielu_weights(stored: torch.Tensor) -> torch.Tensor:
    """Curvature above 0 and below it, slope at 0 and least input, of a file's alpha_p, alpha_n, beta and eps."""
    alpha_p, alpha_n, beta, eps = stored
    return torch.stack((softplus(alpha_p), beta + softplus(alpha_n), beta, eps))
