"""A packed product in 8-bit integers on the CPU, nearly flat in the rows of a verify pass.

Codes of 2 to 8 bits (those of 3 take 4) are unpacked in registers once for up to 8 rows, and multiplied with
activations that are rounded to 8 bits, symmetrically, with one scale per row and group of at most 128 inputs. That
rounding is the kernel's error: 0.6 % of a product's norm on normally distributed activations (a bfloat16 output alone
rounds by 0.2 %). A row's product does not depend on the rows beside it, to the last bit. The arithmetic is
`cpu/codes.h`, compiled on first use for the processor's instruction set; those with VNNI are the fastest.
"""

from dataclasses import dataclass, replace

import torch

from quasar_core.checkpoint.gptq_format import QuantizedWeight
from quasar_core.kernels.base import LayerShape
from quasar_core.kernels.cpu.huge_pages import empty_in_huge_pages
from quasar_core.kernels.cpu.library import library, why_not_here

BLOCK = 32  # outputs that share a stream, in two registers of 16
_GROUPS = (128, 64, 32, 16)  # inputs that share a scale of the activations
_HEADER = 128  # bytes of a block's scales and zeros in each group
_AT_ONCE = 256  # blocks that are brought into order at a time: a large head is copied three times on the way


@dataclass(frozen=True)
class VnniWeight:
    """Scales, zeros and codes as one stream per block of outputs: [blocks, groups, bytes], as `cpu/codes.h` has it."""

    stream: torch.Tensor
    bits: int  # that a code takes: 2, 4 or 8
    group: int  # inputs that share a scale of the activations; the last group is filled up with zeros
    in_features: int
    out_features: int

    @property
    def groups(self) -> int:
        """Groups of inputs that share a scale of the activations."""
        return self.stream.shape[1]


class VnniKernel:
    """8-bit activations on packed codes."""

    name = "vnni"

    def why_not(self, shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
        """Ordered groups of sixteens, bf16 or float32, on a CPU with a C++ compiler."""
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device.type}"
        if dtype not in (torch.bfloat16, torch.float32):
            return f"it takes bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
        if not shape.trivial_groups:
            return "its groups must be in order, and g_idx is not"
        if not _possible_groups(shape.group_size):
            return f"groups of {shape.group_size} do not divide into sixteens"
        return why_not_here()

    def prepare(self, weight: QuantizedWeight, device: torch.device, dtype: torch.dtype) -> VnniWeight:
        """Scales, zeros and codes into the order in which the product reads them."""
        bits = 4 if weight.bits == 3 else weight.bits
        group = _group(weight.in_features, weight.group_size, bits)
        blocks, groups = -(-weight.out_features // BLOCK), -(-weight.in_features // group)
        stream = empty_in_huge_pages(blocks, groups, _HEADER + group * BLOCK * bits // 8, dtype=torch.uint8)
        for begin in range(0, blocks, _AT_ONCE):
            some = stream[begin : begin + _AT_ONCE]
            outputs = slice(begin * BLOCK, (begin + len(some)) * BLOCK)
            padded = _padded(_some_outputs(weight, outputs), group)
            torch.cat([_headers(padded, group), _bodies(padded.codes, bits, group)], dim=-1, out=some)
        return VnniWeight(stream, bits, group, weight.in_features, weight.out_features)

    def multiply(self, x: torch.Tensor, prepared: VnniWeight) -> torch.Tensor:
        """One product of any number of rows, in as many threads as PyTorch uses."""
        x = x.contiguous()
        y = x.new_empty(x.shape[0], prepared.out_features)
        library().quasar_multiply_codes(
            x.data_ptr(),
            prepared.stream.data_ptr(),
            y.data_ptr(),
            x.shape[0],
            prepared.in_features,
            prepared.out_features,
            prepared.groups,
            prepared.group,
            prepared.bits,
            x.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )
        return y


def picked_rows(weight: VnniWeight, rows: torch.Tensor) -> VnniWeight:
    """The outputs `rows` [R] of a weight as a weight of their own, scales, zeros and codes as they are."""
    blocks = -(-len(rows) // BLOCK)
    stream = empty_in_huge_pages(blocks, *weight.stream.shape[1:], dtype=torch.uint8).zero_()
    places = torch.arange(len(rows))
    for kept, whole in zip(_by_output(stream), _by_output(weight.stream), strict=True):
        kept[_block_half_lane(places)] = whole[_block_half_lane(rows)]
    return replace(weight, stream=stream, out_features=len(rows))


def _by_output(stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of headers and codes, an output's block, register and lane first: [blocks, 2, 16, groups, …, bytes]."""
    headers = stream[..., :_HEADER].unflatten(-1, (2, 2, 16, 2)).permute(0, 2, 4, 1, 3, 5)
    return headers, stream[..., _HEADER:].unflatten(-1, (-1, 2, 16, 4)).permute(0, 3, 4, 1, 2, 5)


def _block_half_lane(outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return outputs // BLOCK, outputs // 16 % 2, outputs % 16


def _possible_groups(group_size: int) -> list[int]:
    """How many inputs may share a scale of the activations: what divides the weight's groups."""
    return [group for group in _GROUPS if group_size == -1 or group_size % group == 0]


def _group(in_features: int, group_size: int, bits: int) -> int:
    """The possible group that takes the fewest bytes, headers and what fills up the last group included."""

    def size(group: int) -> int:
        return -(-in_features // group) * (_HEADER + group * BLOCK * bits // 8)

    return min(_possible_groups(group_size), key=size)


def _some_outputs(weight: QuantizedWeight, outputs: slice) -> QuantizedWeight:
    codes, scales, zeros = (part[:, outputs] for part in (weight.codes, weight.scales, weight.zeros))
    return replace(weight, codes=codes, scales=scales, zeros=zeros)


def _padded(weight: QuantizedWeight, group: int) -> QuantizedWeight:
    """The outputs filled up to whole blocks, and the inputs to whole groups, with zeros."""
    missing = (0, -weight.out_features % BLOCK)
    codes, scales, zeros = (
        torch.nn.functional.pad(part, missing) for part in (weight.codes, weight.scales, weight.zeros)
    )
    codes = torch.nn.functional.pad(codes, (0, 0, 0, -weight.in_features % group))
    return QuantizedWeight(weight.bits, weight.group_size, codes, scales, zeros, weight.g_idx)


def _headers(weight: QuantizedWeight, group: int) -> torch.Tensor:
    """[blocks, groups, 128] bytes: 16 scales (float16) and 16 zeros (int16), twice."""
    of_group = weight.g_idx[::group].long()
    parts = [part[of_group].view(len(of_group), -1, 2, 16) for part in (weight.scales, weight.zeros.to(torch.int16))]
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1).transpose(0, 1).flatten(2)


def _bodies(codes: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """[blocks, groups, bytes]: 16 outputs × 4 inputs at a time, planes of `bits` bits on top of one another."""
    planes = 8 // bits
    inputs, outputs = codes.shape
    lanes = codes.view(inputs // group, group // (4 * planes), planes, 4, outputs // BLOCK, 2, 16)
    packed = lanes[:, :, 0].clone()
    for plane in range(1, planes):
        packed |= lanes[:, :, plane] << (bits * plane)
    return packed.permute(3, 0, 1, 4, 5, 2).flatten(2)
