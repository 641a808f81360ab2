"""What cases that check a kernel share: their numbers, and how far a result may be off."""

import math
from collections.abc import Callable

import torch

from quasar_core.checkpoint.gptq_format import QuantizedWeight, count_groups, trivial_groups

Case = tuple[str, Callable[[], tuple[float, float]]]  # a name, and what returns an error and its tolerance

CPU = torch.device("cpu")

# One rounding to the output's dtype; the interpreter cuts a bfloat16 off where a GPU rounds it.
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 5e-4}


def relative_error(y: torch.Tensor, exact: torch.Tensor) -> float:
    """‖y − exact‖ ÷ ‖exact‖; NaN where y has one, and NaN is within no tolerance."""
    return float((y.double() - exact).norm() / exact.norm())


def randn(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers, the same for the same shape; made on the device, whose numbers are its own."""
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, device=device).to(dtype)


def poisoned(*shape: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """NaN everywhere: a place that no program writes shows."""
    return torch.full(shape, math.nan, device=device, dtype=dtype)


def name_of(dtype: torch.dtype) -> str:
    """Without its module."""
    return str(dtype).removeprefix("torch.")


def random_codes(
    bits: int, in_features: int, out_features: int, group_size: int, symmetric: bool, device: torch.device = CPU
) -> QuantizedWeight:
    """Random codes, scales and zeros, the same for the same arguments."""
    generator = torch.Generator(device).manual_seed(bits * in_features + out_features)
    shape, groups = (in_features, out_features), (count_groups(in_features, group_size), out_features)
    zeros = torch.randint(0, 2**bits + 1, groups, generator=generator, device=device)
    return QuantizedWeight(
        bits,
        group_size,
        torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8, device=device),
        (torch.rand(groups, generator=generator, device=device) + 0.1).half(),
        (torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros).to(torch.int32),
        trivial_groups(in_features, group_size).to(device),
    )
