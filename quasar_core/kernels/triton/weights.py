"""Packed codes in the order in which the tensor cores of a GPU want them.

A tensor core multiplies 16 outputs × 16 inputs at a time, and each of 32 lanes holds 8 of those 256 numbers: outputs g
and g + 8, inputs 2t, 2t + 1, 2t + 8, 2t + 9 of lane 4g + t. The codes are stored so that a lane reads its own, 16
bytes at a time and neighbours next to each other, and nothing moves between lanes.

A 32-bit word holds 32 ÷ bits codes of one output. Its bits 0 and 16 begin a pair of neighbouring inputs, and so on up,
so that one shift and one mask yield two codes in the two halves. The pairs of a word belong to different chunks of
inputs (a chunk lies in one group), 16 ÷ bits chunks being a step: within each chunk, inputs are in their own order.
Letters: S blocks of 64 outputs, K steps, F sixteens of inputs in a chunk.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from quasar_core.checkpoint.gptq_format import QuantizedWeight

BLOCK = 64  # outputs stored together: what four warps multiply at once
LARGEST_CHUNK, SMALLEST_CHUNK = 128, 16


@dataclass(frozen=True)
class TritonWeight:
    """A layer on the device; sizes are those of the layer, the tensors are filled up to whole blocks and steps."""

    words: torch.Tensor  # [S, K, 512·F] int32
    scales: torch.Tensor  # [G', 64·S] float16; one row beyond the groups, so that the next may always be read
    zeros: torch.Tensor | None  # [G', 64·S] int16; None where all are 2^(bits − 1)
    bits: int  # that a code takes: 2, 4 or 8
    middle: int  # the zero of a symmetric layer
    chunk: int  # inputs of a step that share a group
    chunks_per_group: int
    in_features: int
    out_features: int

    @property
    def chunks_per_step(self) -> int:
        """Pairs of codes in a word."""
        return 16 // self.bits

    @property
    def steps(self) -> int:
        """K."""
        return self.words.shape[1]


def chunk_size(in_features: int, group_size: int) -> int:
    """Inputs of a chunk: the largest power of two, at most 128, that divides the groups."""
    return LARGEST_CHUNK if _is_one_group(in_features, group_size) else math.gcd(group_size, LARGEST_CHUNK)


def _is_one_group(in_features: int, group_size: int) -> bool:
    return group_size == -1 or group_size >= in_features


def prepare_packed(weight: QuantizedWeight, device: torch.device) -> TritonWeight:
    """Codes, scales and zeros of a layer with ordered groups in the kernel's order, on the device."""
    bits = 4 if weight.bits == 3 else weight.bits
    chunk = chunk_size(weight.in_features, weight.group_size)
    step = chunk * (16 // bits)
    steps, blocks = -(-weight.in_features // step), -(-weight.out_features // BLOCK)
    missing = (0, BLOCK * blocks - weight.out_features)
    single = _is_one_group(weight.in_features, weight.group_size)
    chunks_per_group = steps * step // chunk if single else weight.group_size // chunk
    rows = -(-steps * (16 // bits) // chunks_per_group) + 1
    tables = (weight.scales, weight.zeros.to(torch.int16))
    scales, zeros = (pad(table, (*missing, 0, rows - table.shape[0])).to(device).contiguous() for table in tables)
    middle = 2 ** (weight.bits - 1)
    codes = pad(weight.codes.to(device), (*missing, 0, steps * step - weight.in_features))
    return TritonWeight(
        words=_pack(codes, bits, chunk),
        scales=scales,
        zeros=None if bool((weight.zeros == middle).all()) else zeros,
        bits=bits,
        middle=middle,
        chunk=chunk,
        chunks_per_group=chunks_per_group,
        in_features=weight.in_features,
        out_features=weight.out_features,
    )


def _pack(codes: torch.Tensor, bits: int, chunk: int) -> torch.Tensor:
    """Codes [K·step, 64·S] uint8 → words [S, K, 512·F] int32."""
    pairs, fragments = 16 // bits, chunk // 16
    # k: step; i: pair of the word; f: sixteen of inputs; c: half of it; t, h: lane and half of the word's pair
    lanes = codes.view(-1, pairs, fragments, 2, 4, 2, codes.shape[1] // BLOCK, 4, 2, 8)  # k i f c t h | s b r g
    words = torch.zeros_like(lanes[:, 0, :, :, :, 0], dtype=torch.int32)  # k f c t | s b r g
    for pair in range(pairs):
        for half in range(2):
            words |= lanes[:, pair, :, :, :, half].to(torch.int32) << (bits * pair + 16 * half)
    return words.permute(4, 0, 1, 5, 7, 3, 2, 6).reshape(words.shape[4], words.shape[0], -1)  # s k f b g t c r


def dequantize(weight: TritonWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] that the codes stand for; computed in float32, then rounded."""
    steps, pairs, fragments = weight.steps, weight.chunks_per_step, weight.chunk // 16
    words = weight.words.view(-1, steps, fragments, 4, 8, 4, 2, 2).permute(0, 3, 7, 4, 1, 2, 6, 5)  # s b r g k f c t
    shifts = torch.arange(pairs, device=words.device) * weight.bits
    shifts = torch.stack((shifts, shifts + 16), dim=-1).to(torch.int32)  # i h
    codes = (words[..., None, None] >> shifts) & (2**weight.bits - 1)  # s b r g k f c t i h
    codes = codes.permute(0, 1, 2, 3, 4, 8, 5, 6, 7, 9).reshape(words.shape[0] * BLOCK, -1)  # out, (k i f c t h)
    groups = torch.arange(codes.shape[1], device=codes.device) // weight.chunk // weight.chunks_per_group
    zeros = weight.middle if weight.zeros is None else weight.zeros.float()[groups].t()
    exact = weight.scales.float()[groups].t() * (codes.float() - zeros)
    wanted: torch.Tensor = exact[: weight.out_features, : weight.in_features]
    return wanted.to(dtype).contiguous()
