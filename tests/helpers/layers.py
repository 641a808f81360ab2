"""Helpers of the tests."""

import torch

from quasar_core.quantize.solve.hessian import HessianAccumulator


def make_layer(out_features: int, in_features: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [out, in] and correlated inputs [n, in]."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    mixing = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    return weight, torch.randn(2 * in_features, in_features, generator=generator) @ mixing


def make_hessian(inputs: torch.Tensor) -> torch.Tensor:
    accumulator = HessianAccumulator(inputs.shape[1], inputs.device)
    accumulator.add(inputs)
    return accumulator.finish("the layer")
