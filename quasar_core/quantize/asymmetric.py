"""Asymmetric calibration: aim at what the full-precision model computes, not at the layer's own weight. Pure.

A layer of the verifier reads inputs x that earlier layers have disturbed; the full-precision model's layer reads x̄.
The weight that turns x into the outputs W x̄ as well as a weight can is the least-squares solution

    W* = W + (W · Σ (x̄ − x) xᵀ + ½ · Σ (r̄ − r) xᵀ) · (Σ x xᵀ + λI)⁻¹,

which then takes W's place in the solver: its codes make good, as far as they can, for the errors before them. The
first term is GPTAQ's (Li et al., 2025, arXiv 2504.02692), who fold it into each column's update; rounding W* needs no
solver of its own. The second, ours, asks the same of the residual stream r that the outputs are added to. Half of it
did better than all: what a layer adds in place of another fits other text less well. The inverse is the solver's own
factor, and λ its damping: directions that the text hardly excites are left alone.
"""

import torch

from quasar_core.quantize.hessian import Drift

STREAM_SHARE = 0.5
PIECE = 512  # outputs


def lacking_outputs(weight: torch.Tensor, drift: Drift) -> torch.Tensor:
    """What W x lacks, times x: the bracket above [out, in], for W [out, in]. The drift's stream is used up for it."""
    lacking = torch.zeros(weight.shape, device=weight.device) if drift.stream is None else drift.stream
    for rows, some in zip(lacking.split(PIECE), weight.split(PIECE), strict=True):
        rows.addmm_(some.float(), drift.inputs, beta=STREAM_SHARE)
    return lacking
