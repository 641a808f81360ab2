"""Asymmetric calibration: aim at what the full-precision model computes, not at the layer's own weight. Pure.

A layer of the verifier reads inputs x that earlier layers have disturbed; the full-precision model's layer reads x̄.
The weight that turns x into the outputs W x̄ as well as a weight can is the least-squares solution

    W* = W + (W · Σ (x̄ − x) xᵀ + ½ · Σ (r̄ − r) xᵀ) · (Σ x xᵀ + λI)⁻¹,

which then takes W's place in the solver: its codes make good, as far as they can, for the errors before them. The
first term is GPTAQ's (Li et al., 2025, arXiv 2504.02692), who fold it into each column's update; rounding W* needs no
solver of its own. The second, ours, asks the same of the residual stream r that the outputs are added to. Half of it
did better than all: what a layer adds in place of another fits other text less well.
"""

import torch

from quasar_core.errors import QuasarError
from quasar_core.quantize.hessian import Drift

STREAM_SHARE = 0.5


def corrected_weight(weight: torch.Tensor, hessian: torch.Tensor, drift: Drift, damp: float) -> torch.Tensor:
    """W* [out, in] for W [out, in] and H [in, in].

    λ = damp · mean(diag H), as in the solver: directions that the text hardly excites are left alone.
    """
    damped = hessian.clone()
    damped.diagonal().add_(damp * hessian.diagonal().mean())
    damped.diagonal()[damped.diagonal() == 0] = 1.0
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed.item():  # no damping at all, and inputs that depend on one another
        raise QuasarError("A layer's inputs depend on one another: use more calibration text, or a larger --damp.")
    del damped
    wanted = weight @ drift.inputs
    if drift.stream is not None:
        wanted += STREAM_SHARE * drift.stream
    correction: torch.Tensor = torch.cholesky_solve(wanted.t(), factor).t()
    return weight + correction
