"""Packed codes: the AutoGPTQ layout of a linear layer, version 1 (and the zeros of version 2).

Codes of `bits` bits run as one little-endian stream through 32-bit words, for every width alike: 2, 4 and 8 bits fill
a word exactly, 3 bits fill three words with 32 codes. Letters: in and out are the layer's sizes, g the group size,
G = ⌈in / g⌉ the number of groups.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from quasar_core.config import BITS
from quasar_core.errors import QuasarError

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_WORD = 0xFFFFFFFF


def codes_per_period(bits: int) -> int:
    """The smallest number of codes that fills whole words: a packed size must be a multiple of it."""
    return 32 // bits if 32 % bits == 0 else 32


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes [n, m] (any integer dtype, 0 ≤ code < 2^bits) along n into int32 [n·bits/32, m]."""
    n, m = codes.shape
    period = codes_per_period(bits)
    if n % period:
        raise ValueError(f"{n} rows of {bits}-bit codes do not fill whole words: use a multiple of {period}")
    blocks = codes.reshape(n // period, period, m)
    words = torch.zeros(n // period, period * bits // 32, m, dtype=torch.int64, device=codes.device)
    for i in range(period):
        word, shift = divmod(i * bits, 32)
        shifted = blocks[:, i].to(torch.int64) << shift
        words[:, word] |= shifted & _WORD
        if shift + bits > 32:
            words[:, word + 1] |= shifted >> 32
    signed = (words ^ 0x80000000) - 0x80000000
    return signed.to(torch.int32).view(-1, m)


def unpack_rows(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack_rows`: int32 [n·bits/32, m] → uint8 [n, m]."""
    if 8 % bits == 0:
        return _unpack_bytes(words, bits)
    period = codes_per_period(bits)
    blocks = (words.to(torch.int64) & _WORD).view(-1, period * bits // 32, words.shape[1])
    codes = []
    for i in range(period):
        word, shift = divmod(i * bits, 32)
        value = blocks[:, word] >> shift
        if shift + bits > 32:
            value = value | (blocks[:, word + 1] << (32 - shift))
        codes.append((value & (2**bits - 1)).to(torch.uint8))
    return torch.stack(codes, dim=1).view(-1, words.shape[1])


def _unpack_bytes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of 2, 4 or 8 bits lie within bytes, so that no wider numbers are needed, which take longer."""
    n, m = words.shape
    whole = words.reshape(-1).view(torch.uint8).view(n, 4 * m)
    codes = torch.stack([whole >> shift & 2**bits - 1 for shift in range(0, 8, bits)], dim=-1)
    return codes.view(n, m, 32 // bits).transpose(1, 2).reshape(n * 32 // bits, m)


def pack_columns(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes [n, m] along m into int32 [n, m·bits/32]."""
    return pack_rows(codes.t().contiguous(), bits).t().contiguous()


def unpack_columns(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack_columns`: int32 [n, m·bits/32] → uint8 [n, m]."""
    return unpack_rows(words.t().contiguous(), bits).t().contiguous()


@dataclass(frozen=True)
class QuantizedWeight:
    """The codes of a linear layer: W[i, o] = scales[g_idx[i], o] · (codes[i, o] − zeros[g_idx[i], o])."""

    bits: int
    group_size: int
    codes: torch.Tensor  # [in, out] uint8
    scales: torch.Tensor  # [G, out] float16
    zeros: torch.Tensor  # [G, out] int32, 1 to 2^bits − 1 where written here
    g_idx: torch.Tensor  # [in] int32

    @property
    def in_features(self) -> int:
        """Rows of the stored layout."""
        return self.codes.shape[0]

    @property
    def out_features(self) -> int:
        """Columns of the stored layout."""
        return self.codes.shape[1]

    @property
    def has_trivial_groups(self) -> bool:
        """Whether rows belong to groups in order, as kernels want it."""
        return torch.equal(self.g_idx.cpu(), trivial_groups(self.in_features, self.group_size))

    @property
    def is_symmetric(self) -> bool:
        """Whether all zeros are the middle of the codes, 2^(bits − 1)."""
        return bool((self.zeros == 2 ** (self.bits - 1)).all())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as `torch.nn.Linear` holds it, [out, in]; computed in float32, then rounded."""
        index = self.g_idx.long()
        weight = self.codes.float().sub_(self.zeros.float()[index]).mul_(self.scales.float()[index])
        return weight.t().to(dtype).contiguous()

    def pack(self) -> dict[str, torch.Tensor]:
        """The tensors of the checkpoint, version 1: zeros are stored minus one, so that 0 has no place."""
        if int(self.zeros.min()) < 1:
            raise ValueError("version 1 of the format cannot store a zero of 0")
        return {
            "qweight": pack_rows(self.codes, self.bits),
            "qzeros": pack_columns(self.zeros - 1, self.bits),
            "scales": self.scales.contiguous(),
            "g_idx": self.g_idx.contiguous(),
        }


def join_outputs(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Layers of one input, bits and groups as one layer, output after output; ValueError where these differ."""
    first, *others = weights
    for other in others:
        same_layout = (first.bits, first.group_size) == (other.bits, other.group_size)
        if not same_layout or not torch.equal(first.g_idx, other.g_idx):
            raise ValueError("they differ in bits or groups")
    return replace(
        first,
        codes=torch.cat([weight.codes for weight in weights], dim=1),
        scales=torch.cat([weight.scales for weight in weights], dim=1),
        zeros=torch.cat([weight.zeros for weight in weights], dim=1),
    )


def cut_outputs(tensors: Mapping[str, torch.Tensor], bits: int, count: int) -> list[dict[str, torch.Tensor]]:
    """A layer's stored tensors, bias included, as those of `count` layers of equal size, output after output.

    What is stored stays so, whatever it means: zeros are unpacked, since a word holds those of several outputs, and
    packed again. ValueError where the parts' outputs do not fill whole words.
    """
    size, rest = divmod(tensors["scales"].shape[1], count)
    if rest:
        raise ValueError(f"{tensors['scales'].shape[1]} outputs cannot be cut into {count} equal parts")
    zeros = unpack_columns(tensors["qzeros"], bits)
    parts = []
    for begin in range(0, size * count, size):
        outputs = slice(begin, begin + size)
        part = {"qzeros": pack_columns(zeros[:, outputs], bits)}
        part |= {name: tensors[name][:, outputs].contiguous() for name in ("qweight", "scales")}
        part |= {"g_idx": tensors["g_idx"].clone()} if "g_idx" in tensors else {}
        part |= {"bias": tensors["bias"][outputs].contiguous()} if "bias" in tensors else {}
        parts.append(part)
    return parts


def trivial_groups(in_features: int, group_size: int) -> torch.Tensor:
    """g_idx of rows grouped in order; a group size of −1 is one group."""
    size = in_features if group_size == -1 else group_size
    return (torch.arange(in_features) // size).to(torch.int32)


def count_groups(in_features: int, group_size: int) -> int:
    """G, the last group possibly shorter."""
    return 1 if group_size == -1 else -(-in_features // group_size)


def why_not_packable(in_features: int, out_features: int, bits: int) -> str | None:
    """Why the layout cannot hold a layer of this size, or None where it can."""
    period = codes_per_period(bits)
    for size, what in ((in_features, "inputs"), (out_features, "outputs")):
        if size % period:
            return f"{size} {what} are not a multiple of {period}, as {bits}-bit words need"
    return None


@dataclass(frozen=True)
class PackedLayout:
    """The sizes of a layer in GPTQ's layout, as the shapes of its tensors tell them."""

    in_features: int
    out_features: int
    bits: int
    group_size: int


def infer_layout(name: str, shapes: Mapping[str, tuple[int, ...]], bits: int, group_size: int) -> PackedLayout:
    """A layer's sizes; `bits` and `group_size` are the checkpoint's usual ones.

    So layers of widths of their own (`dynamic`), and configs that name no group size, need no table. QuasarError where
    the shapes contradict each other.
    """
    missing = {"qweight", "qzeros", "scales"} - shapes.keys()
    if missing:
        raise QuasarError(f"The checkpoint's layer {name} has no {', '.join(sorted(missing))}.")
    qweight, scales = shapes["qweight"], shapes["scales"]
    if len(qweight) != 2 or 0 in qweight:
        raise QuasarError(
            f"The checkpoint's layer {name} has qweight of shape {qweight}, which {bits}-bit codes cannot fill."
        )
    if len(scales) != 2 or 0 in scales:
        raise QuasarError(f"The checkpoint's layer {name} has scales of shape {scales}.")
    (words, out_features), rows = qweight, math.prod(shapes.get("g_idx", (0,)))
    found = next((width for width in (bits, *BITS) if width * rows == words * 32), bits)
    in_features = words * 32 // found
    if (words * 32) % found or why_not_packable(in_features, out_features, found):
        raise QuasarError(
            f"The checkpoint's layer {name} has qweight of shape {qweight}, which {found}-bit codes cannot fill."
        )
    return PackedLayout(in_features, out_features, found, _size_of_groups(in_features, scales[0], group_size))


def _size_of_groups(in_features: int, groups: int, usual: int) -> int:
    """The usual size where it makes so many groups, else the size that does; the usual one where none does."""
    if count_groups(in_features, usual) == groups or in_features % groups:
        return usual
    return -1 if groups == 1 else in_features // groups


def unpack_weight(
    name: str,
    tensors: Mapping[str, torch.Tensor],
    bits: int,
    group_size: int,
    zeros_offset: int,
    symmetric: bool = False,
) -> QuantizedWeight:
    """Read a layer's tensors strictly; `zeros_offset` is 1 for format version 1 and 0 for version 2.

    Of `symmetric` codes the zeros tell the version themselves (`offset_of_symmetric`).
    """
    layout = infer_layout(name, {key: tuple(tensor.shape) for key, tensor in tensors.items()}, bits, group_size)
    bits, size = layout.bits, layout.group_size
    for what, tensor in tensors.items():
        check_part(name, what, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), layout)
    stored = unpack_columns(tensors["qzeros"], bits).to(torch.int32)
    zeros = stored + (offset_of_symmetric(stored, bits, zeros_offset) if symmetric else zeros_offset)
    g_idx = tensors.get("g_idx", trivial_groups(layout.in_features, size)).to(torch.int32)
    groups = count_groups(layout.in_features, size)
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise QuasarError(f"The checkpoint's layer {name} has a g_idx outside its {groups} groups.")
    scales = tensors["scales"].to(torch.float16)
    if not bool(torch.isfinite(scales).all()):
        raise QuasarError(f"The checkpoint's layer {name} has scales that are not finite.")
    return QuantizedWeight(bits, size, unpack_rows(tensors["qweight"], bits), scales, zeros, g_idx)


def offset_of_symmetric(stored: torch.Tensor, bits: int, named: int) -> int:
    """What to add to stored zeros whose meaning is the middle of the codes, 2^(bits − 1).

    Some tools write version 2 under version 1's name. The named offset holds where the zeros are not all of one kind.
    """
    first, middle = int(stored.flatten()[0]), 2 ** (bits - 1)
    return middle - first if first in (middle, middle - 1) and bool((stored == first).all()) else named


def check_part(name: str, what: str, shape: tuple[int, ...], dtype: str, layout: PackedLayout) -> None:
    """QuasarError for a tensor of a layer whose shape or dtype does not fit; its header is enough.

    Words are int32, group numbers integers, scales floating point of 16 bits and more.
    """
    groups = count_groups(layout.in_features, layout.group_size)
    expected = {
        "scales": (groups, layout.out_features),
        "qzeros": (groups, layout.out_features * layout.bits // 32),
        "g_idx": (layout.in_features,),
    }.get(what, shape)
    scales = tuple(str(kind).removeprefix("torch.") for kind in SCALE_DTYPES)
    dtypes = {"scales": scales, "g_idx": ("int32", "int64")}.get(what, ("int32",))
    if dtype not in dtypes:
        raise QuasarError(f"The checkpoint's layer {name} has {what} in {dtype}, which this version does not read.")
    if shape != expected:
        raise QuasarError(f"The checkpoint's layer {name} has {what} of shape {shape}, not {expected}.")
