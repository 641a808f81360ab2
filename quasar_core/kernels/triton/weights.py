"""Packed codes in the order in which the tensor cores of a GPU want them.

A tensor core multiplies 16 outputs × 16 inputs at a time, and each of 32 lanes holds 8 of those 256 numbers: of lane
4g + t, those of outputs g and g + 8, and of each of these four inputs. Which inputs stand for which is free as long as
the rows of the pass have the same order: here they are 4t to 4t + 3, neighbours. So a lane reads its own codes 16 bytes
at a time, with other lanes' next to them, and nothing moves between lanes.

A 32-bit word holds 32 ÷ bits codes of one output. Its bits 0 and 16 begin a pair of neighbouring inputs, and so on up,
so that one shift and one mask yield two codes in the two halves. The pairs of a word belong to different chunks of
inputs (a chunk lies in one group), 16 ÷ bits chunks being a step: within each chunk, inputs are in their own order.
In front of a step's words are those of its scales: of each output a word for each two chunks, of two float16 scales;
or where there are zeros, a word for each chunk, with the zero in the upper half.
Letters: S blocks of 64 outputs, K steps, F sixteens of inputs in a chunk, W words of scales of an output in a step.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from quasar_core.checkpoint.gptq_format import QuantizedWeight

BLOCK = 64  # outputs stored together: what four warps multiply at once
LARGEST_CHUNK, SMALLEST_CHUNK = 128, 16
_AT_ONCE = 64  # blocks that are packed at a time


@dataclass(frozen=True)
class TritonWeight:
    """A layer on the device; sizes are those of the layer, the tensors are filled up to whole blocks and steps."""

    words: torch.Tensor  # [S, K, 64·W + 512·F] int32
    bits: int  # that a code takes: 2, 4 or 8
    middle: int  # the zero of a symmetric layer
    chunk: int  # inputs of a step that share scales
    has_zeros: bool  # no where all are the middle
    in_features: int
    out_features: int

    @property
    def chunks_per_step(self) -> int:
        """Pairs of codes in a word."""
        return 16 // self.bits

    @property
    def tables(self) -> int:
        """W."""
        return words_of_scales(self.bits, self.has_zeros)

    @property
    def steps(self) -> int:
        """K."""
        return self.words.shape[1]


def chunk_size(in_features: int, group_size: int) -> int:
    """Inputs of a chunk: the largest power of two, at most 128, that divides the groups."""
    return LARGEST_CHUNK if _is_one_group(in_features, group_size) else math.gcd(group_size, LARGEST_CHUNK)


def tight_chunk(in_features: int, group_size: int, bits: int) -> int:
    """The chunk, or a part of it, with which codes and scales take the least room: a last step may be half empty."""
    largest = chunk_size(in_features, group_size)

    def size(chunk: int) -> float:
        step = chunk * (16 // bits)
        return -(-in_features // step) * step * (bits + 16 / chunk)

    return min((chunk for chunk in (largest, largest // 2, largest // 4) if chunk >= SMALLEST_CHUNK), key=size)


def _is_one_group(in_features: int, group_size: int) -> bool:
    return group_size == -1 or group_size >= in_features


def words_of_scales(bits: int, has_zeros: bool) -> int:
    """W, the words of scales of an output in a step."""
    return 16 // bits if has_zeros else 8 // bits


def prepare_packed(weight: QuantizedWeight, device: torch.device, tight: bool = False) -> TritonWeight:
    """Codes, scales and zeros of a layer with ordered groups in the kernel's order, on the device.

    `tight` is for layers of few inputs, such as experts': their chunks are those that take the least room.
    """
    bits, middle = 4 if weight.bits == 3 else weight.bits, 2 ** (weight.bits - 1)
    sizes = weight.in_features, weight.group_size
    chunk = tight_chunk(*sizes, bits) if tight else chunk_size(*sizes)
    step = chunk * (16 // bits)
    steps, blocks = -(-weight.in_features // step), -(-weight.out_features // BLOCK)
    has_zeros = not weight.is_symmetric
    tables = _pack_tables(weight, steps * step // chunk, chunk, has_zeros).to(device)
    width = BLOCK * words_of_scales(bits, has_zeros)
    words = torch.zeros(blocks, steps, width + chunk * BLOCK // 2, dtype=torch.int32, device=device)
    for begin in range(0, blocks, _AT_ONCE):  # in parts, since codes in 32 bits take four times their room
        part = slice(begin * BLOCK, (begin + _AT_ONCE) * BLOCK)
        rows = slice(begin, begin + _AT_ONCE)
        codes = _whole_blocks(weight.codes[:, part].to(device), steps * step)
        words[rows, :, width:] = _pack(codes, bits, chunk)
        scales = _whole_blocks(tables[:, part], len(tables)).view(steps, -1, len(words[rows]), BLOCK)
        words[rows, :, :width] = scales.permute(2, 0, 1, 3).flatten(2)
    return TritonWeight(words, bits, middle, chunk, has_zeros, weight.in_features, weight.out_features)


def _whole_blocks(table: torch.Tensor, rows: int) -> torch.Tensor:
    """A table [rows, outputs] filled up with zeros to whole blocks of outputs."""
    return pad(table, (0, -table.shape[1] % BLOCK, 0, rows - table.shape[0]))


def _pack_tables(weight: QuantizedWeight, chunks: int, chunk: int, has_zeros: bool) -> torch.Tensor:
    """Scales and zeros [groups, outputs] → words [chunks, outputs], or of scales alone [chunks ÷ 2, outputs], int32."""
    size = weight.in_features if _is_one_group(weight.in_features, weight.group_size) else weight.group_size
    groups = torch.arange(chunks, device=weight.scales.device) * chunk // size
    known = groups < len(weight.scales)  # a last step may be longer than the layer

    def of_chunks(table: torch.Tensor) -> torch.Tensor:
        return table[groups.clamp(max=len(table) - 1)].to(torch.int32) * known[:, None]

    lower = of_chunks(weight.scales.to(torch.float16).view(torch.int16)) & 0xFFFF
    if has_zeros:
        return lower | of_chunks(weight.zeros) << 16
    return lower[::2] | lower[1::2] << 16


def _pack(codes: torch.Tensor, bits: int, chunk: int) -> torch.Tensor:
    """Codes [K·step, 64·S] uint8 → words [S, K, 512·F] int32."""
    pairs, fragments = 16 // bits, chunk // 16
    # k: step; i: pair of the word; f: sixteen of inputs; t: lane; j: its first or second pair; h: half of the pair
    lanes = codes.reshape(-1, pairs, fragments, 4, 2, 2, codes.shape[1] // BLOCK, 4, 2, 8)  # k i f t j h | s b r g
    words = torch.zeros_like(lanes[:, 0, :, :, :, 0], dtype=torch.int32)  # k f t j | s b r g
    for pair in range(pairs):
        for half in range(2):
            words |= lanes[:, pair, :, :, :, half].to(torch.int32) << (bits * pair + 16 * half)
    return words.permute(4, 0, 1, 5, 7, 2, 3, 6).reshape(words.shape[4], words.shape[0], -1)  # s k f b g t j r


def dequantize(weight: TritonWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] that the codes stand for; computed in float32, then rounded."""
    steps, pairs, fragments, width = weight.steps, weight.chunks_per_step, weight.chunk // 16, BLOCK * weight.tables
    words = weight.words[:, :, width:].reshape(-1, steps, fragments, 4, 8, 4, 2, 2)
    words = words.permute(0, 3, 7, 4, 1, 2, 5, 6)  # s b r g k f t j
    shifts = torch.arange(pairs, device=words.device) * weight.bits
    shifts = torch.stack((shifts, shifts + 16), dim=-1).to(torch.int32)  # i h
    codes = (words[..., None, None] >> shifts) & (2**weight.bits - 1)  # s b r g k f t j i h
    codes = codes.permute(0, 1, 2, 3, 4, 8, 5, 6, 7, 9).reshape(words.shape[0] * BLOCK, steps * pairs, -1)
    tables = weight.words[:, :, :width].unflatten(2, (-1, BLOCK)).permute(0, 3, 1, 2)  # s output k w
    if weight.has_zeros:
        zeros = (tables >> 16).flatten(2).flatten(0, 1)[..., None]
    else:
        tables, zeros = torch.stack((tables, tables >> 16), -1), weight.middle
    scales = tables.to(torch.int16).contiguous().view(torch.float16).float().flatten(2).flatten(0, 1)[..., None]
    exact = (scales * (codes.float() - zeros)).flatten(1)  # out, (k i) (f t j h)
    wanted: torch.Tensor = exact[: weight.out_features, : weight.in_features]
    return wanted.to(dtype).contiguous()
