"""The one interface of packed kernels: whether it supports a layer, prepare its weight once, multiply with it.

Letters: T rows of a pass, in and out the layer's sizes.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from quasar_core.checkpoint.packing import QuantizedWeight


@dataclass(frozen=True)
class LayerShape:
    """What a kernel's support depends on."""

    in_features: int
    out_features: int
    bits: int
    group_size: int
    trivial_groups: bool

    @classmethod
    def of(cls, weight: QuantizedWeight) -> "LayerShape":
        """The shape of a layer's codes."""
        return cls(weight.in_features, weight.out_features, weight.bits, weight.group_size, weight.has_trivial_groups)


class Kernel(Protocol):
    """A way to multiply by packed codes."""

    name: str

    def why_not(self, shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this kernel cannot run the layer here, or None where it can."""
        ...

    def prepare(self, weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> Any:
        """Bring the weight into the kernel's own layout, once."""
        ...

    def multiply(self, x: torch.Tensor, prepared: Any) -> torch.Tensor:
        """x [T, in] → [T, out], both in the dtype that `prepare` was given."""
        ...
