"""The Hessian of a linear layer's squared output error: H = (2 / n) · Σ x xᵀ over the n calibration inputs x."""

import torch

from quasar_core.errors import QuasarError


class HessianAccumulator:
    """Adds up inputs [..., in] into H [in, in], in float32, whatever the model's dtype."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.count = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Take the inputs of one batch."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self.sum.addmm_(rows.t(), rows)
        self.count += rows.shape[0]

    def finish(self, name: str) -> torch.Tensor:
        """H, checked: one sentence that names the layer where it is empty or not finite."""
        if self.count == 0:
            raise QuasarError(f"Layer {name} saw no calibration input.")
        hessian = self.sum * (2.0 / self.count)
        if not bool(torch.isfinite(hessian).all()):
            raise QuasarError(
                f"Layer {name} has inputs that are not finite: the model's weights or the dtype overflow on this text."
            )
        return hessian
