"""Weights that are published in 8-bit floats with a scale for each block, as many large models are: back to bfloat16.

A weight [out, in] in float8_e4m3fn has beside it, under its name and `_scale_inv`, what its blocks are multiplied by:
a matrix with one number for each block of 128 × 128, or of the size in config.json; or one number for all of it.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from quasar_core.errors import QuasarError

STORED = "F8_E4M3"  # as safetensors names the dtype
SCALE = "_scale_inv"
UNUSED = ("activation_scale", "input_scale")  # of activations, which a pass in 16 bits does not round
BLOCK = (128, 128)


def scale_of(name: str) -> str:
    """The name of a weight's scales."""
    return f"{name}{SCALE}"


def block_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of a block, as config.json has them."""
    rows, columns = (config.get("quantization_config") or {}).get("weight_block_size") or BLOCK
    return int(rows), int(columns)


def dequantize(name: str, codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """A weight [out, in] in bfloat16; QuasarError where its scales are of another shape."""
    if scales.numel() == 1:
        return (codes.float() * scales.float()).bfloat16()
    expected = tuple(math.ceil(size / part) for size, part in zip(codes.shape, block, strict=True))
    if tuple(scales.shape) != expected:
        raise QuasarError(f"The tensor {scale_of(name)} is {tuple(scales.shape)}, and by its blocks {expected}.")
    spread = scales.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return (codes.float() * spread[: codes.shape[0], : codes.shape[1]]).bfloat16()
