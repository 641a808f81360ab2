"""Keep bfloat16 weights in 12 bits each, without loss: the exponents of a strip of outputs as codes of 4 bits.

A pass that decodes is bound by the bytes that it reads, so a quarter less of them is a quarter less time, and a quarter
less memory. `cpu/compressed.h` has the format and the product; the outliers, weights whose exponents
lie far from the others', some in ten thousand, are listed. PyTorch's operations take the weight as it was (`restore`).
"""

import ctypes
from dataclasses import dataclass

import torch

from quasar_core.kernels.cpu import library as cpp
from quasar_core.kernels.cpu.huge_pages import empty_in_huge_pages

STRIP = 16  # outputs whose exponents count from one base
BITS = 12
_CODES = 32  # weights whose codes lie in sixteen bytes
_OUTLIER = 8  # bytes of an outlier, with its place


@dataclass(frozen=True)
class CompressedWeight:
    """A weight [out, in] of bfloat16; `described` is what C++ reads, and points to the others."""

    in_features: int
    out_features: int
    strips: torch.Tensor
    bases: torch.Tensor
    first: torch.Tensor
    outliers: torch.Tensor
    described: cpp.Compressed

    @classmethod
    def of(cls, weight: torch.Tensor) -> "CompressedWeight":
        """Compress a contiguous weight whose inputs are a multiple of 16."""
        rows, columns = weight.shape
        threads, library = torch.get_num_threads(), cpp.library()
        strips = -(-rows // STRIP)
        bases, counts = torch.empty(strips, dtype=torch.uint8), torch.empty(strips, dtype=torch.int32)
        given = weight.data_ptr(), columns, rows
        library.quasar_choose_bases(*given, bases.data_ptr(), counts.data_ptr(), threads)
        first = torch.zeros(strips + 1, dtype=torch.int32)
        torch.cumsum(counts, 0, out=first[1:])
        outliers = torch.empty(int(first[-1]), _OUTLIER, dtype=torch.uint8)
        stream = empty_in_huge_pages(rows * row_bytes(columns), dtype=torch.uint8)
        places = bases.data_ptr(), first.data_ptr(), stream.data_ptr(), outliers.data_ptr()
        library.quasar_compress(*given, *places, threads)
        return cls.at(rows, columns, stream, bases, first, outliers)

    @classmethod
    def at(
        cls,
        rows: int,
        columns: int,
        strips: torch.Tensor,
        bases: torch.Tensor,
        first: torch.Tensor,
        outliers: torch.Tensor,
    ) -> "CompressedWeight":
        """The weight whose parts lie here, or will when it is used."""
        described = cpp.Compressed(strips.data_ptr(), bases.data_ptr(), first.data_ptr(), outliers.data_ptr())
        return cls(columns, rows, strips, bases, first, outliers, described)

    def restore(self) -> torch.Tensor:
        """The weight [out, in] as it was."""
        weight = torch.empty(self.out_features, self.in_features, dtype=torch.bfloat16)
        size = self.in_features, self.out_features
        cpp.library().quasar_restore(ctypes.byref(self.described), *size, weight.data_ptr(), torch.get_num_threads())
        return weight

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return sum(part.nbytes for part in (self.strips, self.bases, self.first, self.outliers))


def parts_fit(rows: int, columns: int, sizes: tuple[int, ...], first: torch.Tensor) -> bool:
    """Whether parts of so many bytes are those of a weight, so that nothing outside of them is read.

    `first` [strips + 1] counts the outliers.
    """
    strips = -(-rows // STRIP)
    if sizes[:3] != (rows * row_bytes(columns), strips, (strips + 1) * first.itemsize) or int(first[0]):
        return False
    return bool((first.diff() >= 0).all()) and sizes[3] == int(first[-1]) * _OUTLIER


def row_bytes(columns: int) -> int:
    """Bytes of an output's weights."""
    return columns + -(-columns // _CODES) * _CODES // 2
