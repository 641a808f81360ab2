"""The Hessian of a linear layer's squared output error: H = (2 / n) · Σ x xᵀ over the n calibration inputs x.

Beside it, where they are known, the drift: how the layer's inputs, and the residual stream that its outputs are added
to, differ from the full-precision model's on the same tokens.
"""

from dataclasses import dataclass

import torch

from quasar_core.errors import QuasarError


@dataclass(frozen=True)
class Drift:
    """(2 / n) · Σ (x̄ − x) xᵀ [in, in] and (2 / n) · Σ (r̄ − r) xᵀ [out, in], for inputs x and stream r, x̄ and r̄ in full
    precision. No second one for a layer that adds nothing to the stream.
    """

    inputs: torch.Tensor
    stream: torch.Tensor | None


class HessianAccumulator:
    """Adds up inputs [..., in] into H [in, in], in float32, whatever the model's dtype."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.input_drift: torch.Tensor | None = None
        self.stream_drift: torch.Tensor | None = None
        self.count = 0

    def add(
        self, inputs: torch.Tensor, wanted: torch.Tensor | None = None, stream_error: torch.Tensor | None = None
    ) -> None:
        """Take the inputs of one batch; beside them x̄ [..., in] and r̄ − r [..., out] where they are known."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self.sum.addmm_(rows.t(), rows)
        if wanted is not None:
            self.input_drift = _add_product(self.input_drift, wanted.reshape(rows.shape).float() - rows, rows)
        if stream_error is not None:
            errors = stream_error.reshape(len(rows), -1).float()
            self.stream_drift = _add_product(self.stream_drift, errors, rows)
        self.count += rows.shape[0]

    def drift(self) -> Drift | None:
        """How inputs and stream differ from the full-precision model's; None where that is not known. Asked once."""
        if self.input_drift is None:
            return None
        share = 2.0 / self.count
        return Drift(self.input_drift.mul_(share), None if self.stream_drift is None else self.stream_drift.mul_(share))

    def finish(self, name: str) -> torch.Tensor:
        """H, checked: one sentence that names the layer where it is empty or not finite. Asked once."""
        if self.count == 0:
            raise QuasarError(f"Layer {name} saw no calibration input.")
        hessian = self.sum.mul_(2.0 / self.count)  # in place: the matrix may be half a gigabyte
        if not bool(torch.isfinite(hessian).all()):
            raise QuasarError(
                f"Layer {name} has inputs that are not finite: the model's weights or the dtype overflow on this text."
            )
        return hessian


def _add_product(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Total + leftᵀ · right."""
    if total is None:
        return left.t() @ right
    return total.addmm_(left.t(), right)
