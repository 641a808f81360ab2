"""Asymmetric calibration: aim at what the full-precision model computes, not at the layer's own weight. Pure.

A layer of the verifier reads inputs x that earlier layers have disturbed; the full-precision model's layer reads x̄.
The weight that turns x into the outputs W x̄ as well as a weight can is the least-squares solution

    W* = W + (W · Σ (x̄ − x) xᵀ + ½ · Σ (r̄ − r) xᵀ) · (Σ x xᵀ + λI)⁻¹,

which then takes W's place in the solver: its codes make good, as far as they can, for the errors before them. The
first term is GPTAQ's (Li et al., 2025, arXiv 2504.02692), who fold it into each column's update; rounding W* needs no
solver of its own. The second, ours, asks the same of the residual stream r that the outputs are added to. Half of it
did better than all: what a layer adds in place of another fits other text less well. The inverse is the solver's own
factor, and λ its damping: directions that the text hardly excites are left alone.

A layer that is alone in reading its inputs has its bracket summed up as it stands. Layers that share inputs share the
drift of these, Σ (x̄ − x) xᵀ, which is smaller than all their brackets.
"""

from collections.abc import Mapping

import torch

from quasar_core.quantize.products import product

STREAM_SHARE = 0.5
PIECE = 512  # outputs


def lone_errors(weight: torch.Tensor, drift: torch.Tensor, stream_error: torch.Tensor | None) -> torch.Tensor:
    """What a layer's outputs lack [..., out], of x̄ − x [..., in] and, where it is known, r̄ − r [..., out]."""
    lacking = product(drift, weight)
    return lacking if stream_error is None else lacking.add_(stream_error, alpha=STREAM_SHARE)


def lacking_outputs(weights: Mapping[str, torch.Tensor], errors: torch.Tensor) -> dict[str, torch.Tensor]:
    """The brackets [out, in] of layers [out, in] by name: the sum of a lone layer's errors; else W times the drift."""
    if len(weights) == 1:
        return dict.fromkeys(weights, errors)
    return {name: _weighted(weight, errors) for name, weight in weights.items()}


def _weighted(weight: torch.Tensor, drift: torch.Tensor) -> torch.Tensor:
    """W [out, in] times the drift [in, in], some outputs at a time: the weight may be of 16 bits."""
    lacking = torch.empty(weight.shape, device=weight.device)
    for rows, some in zip(lacking.split(PIECE), weight.split(PIECE), strict=True):
        torch.mm(some.float(), drift, out=rows)
    return lacking
