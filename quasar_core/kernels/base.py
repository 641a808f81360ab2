"""The one interface of packed kernels: whether it supports a layer, prepare its weight once, multiply with it.

Letters: T rows of a pass, in and out the layer's sizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from quasar_core.checkpoint.compressed_tensors import Float8Weight, PackedWeight


@dataclass(frozen=True)
class LayerShape:
    """What a kernel's support depends on."""

    in_features: int
    out_features: int
    bits: int
    group_size: int
    trivial_groups: bool
    symmetric: bool = True  # all zeros are 2^(bits − 1)
    floating: bool = False  # 8-bit floating-point values in the place of codes

    @classmethod
    def of(cls, weight: PackedWeight) -> "LayerShape":
        """The shape of a layer's codes, or values."""
        if isinstance(weight, Float8Weight):
            return cls(weight.in_features, weight.out_features, 8, -1, trivial_groups=True, floating=True)
        return cls(
            weight.in_features,
            weight.out_features,
            weight.bits,
            weight.group_size,
            weight.has_trivial_groups,
            weight.is_symmetric,
        )


@dataclass(frozen=True)
class RoundedRows:
    """Rows x [T, in] ≈ codes · scales, rounded to 8 bits by whatever computed them."""

    codes: torch.Tensor  # [T, in] int8 or float8
    scales: torch.Tensor  # [T] float32


class Kernel(Protocol):
    """A way to multiply by packed codes or 8-bit floats; `select.py` gives it only layers that it supports."""

    name: str

    def why_not(self, shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this kernel cannot run the layer here, or None where it can."""
        ...

    def prepare(self, weight: Any, device: torch.device, dtype: torch.dtype) -> Any:
        """Bring the weight into the kernel's own layout, once."""
        ...

    def multiply(self, x: torch.Tensor, prepared: Any) -> torch.Tensor:
        """x [T, in] → [T, out], both in the dtype that `prepare` was given."""
        ...


@runtime_checkable
class RoundingKernel(Protocol):
    """A kernel that rounds its rows to 8 bits, unless they come rounded."""

    def rounds_to(self, rows: int, prepared: Any) -> torch.dtype | None:
        """The dtype of the codes that it takes so many rows in; None where it must round them itself."""
        ...

    def multiply_rounded(self, rows: RoundedRows, prepared: Any, dtype: torch.dtype) -> torch.Tensor:
        """Rows [T, in] → [T, out] in `dtype`."""
        ...


@runtime_checkable
class TunableKernel(Protocol):
    """A kernel whose launches have shapes to choose, for each size of a layer and each device."""

    def tune(self, weights: Sequence[Any], dtype: torch.dtype) -> str:
        """Choose by measuring prepared weights of one shape, unless known, and keep it; what was done, or "".

        Call it before the kernel is compared or recorded. It is bounded in time, and does nothing on the CPU.
        """
        ...
