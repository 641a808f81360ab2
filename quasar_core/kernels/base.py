"""The one interface of packed kernels: whether it supports a layer, prepare its weight once, multiply with it.

Letters: T rows of a pass, in and out the layer's sizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

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
    symmetric: bool = True  # all zeros are 2^(bits − 1)

    @classmethod
    def of(cls, weight: QuantizedWeight) -> "LayerShape":
        """The shape of a layer's codes."""
        return cls(
            weight.in_features,
            weight.out_features,
            weight.bits,
            weight.group_size,
            weight.has_trivial_groups,
            weight.is_symmetric,
        )


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


@runtime_checkable
class TunableKernel(Protocol):
    """A kernel whose launches have shapes to choose, for each size of a layer and each device."""

    def tune(self, weights: Sequence[Any], dtype: torch.dtype) -> str:
        """Choose by measuring prepared weights of one shape, unless known, and keep it; what was done, or "".

        Call it before the kernel is compared or recorded. It is bounded in time, and does nothing on the CPU.
        """
        ...
