"""The quantizer's inner loops in C++ (`kernels/cpu/solver.cpp`): columns in turn, sums over tokens, rows of logits.

A wheel carries them, else a C++ compiler builds them on first use; tensors are on the CPU, in float32 but where it is
said. Elsewhere `quantize/` does the same with PyTorch's operations. Letters: C columns of a block, r outputs of a
piece, G groups; in a piece a column's outputs lie beside one another; B texts of L tokens, H heads of D numbers; T rows
of logits, V vocabulary.
"""

import ctypes
from dataclasses import dataclass, fields
from functools import cache

import torch

from quasar_core.errors import QuasarError
from quasar_core.kernels.cpu import build
from quasar_core.kernels.cpu.forms import Chosen, chosen
from quasar_core.kernels.cpu.library import load_library, remark, why_switched_off

SOURCE = build.HERE / f"{build.SOLVER}.cpp"
MOST_COLUMNS, LANES = 128, 16


def why_not_here() -> str | None:
    """Why this machine cannot run the loops, found out once: its compiler, the build, or the user."""
    return why_switched_off() or _why_not_in(chosen())


@cache
def _why_not_in(form: Chosen) -> str | None:
    try:
        _library_in(form)
    except QuasarError as error:
        return str(error)
    return None


def describe_loops() -> str:
    """Which loops the quantizer runs on this processor, and why."""
    obstacle = why_not_here()
    if obstacle:
        return f"PyTorch's operations, not C++: {obstacle}"
    return f"in C++ for {chosen().form.title}{remark(SOURCE)}"


def runs(tensor: torch.Tensor) -> bool:
    """Whether the loops take a tensor of this kind, here."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and why_not_here() is None


def sums_pairs(tensor: torch.Tensor) -> bool:
    """Whether rows of this kind are summed here in products of pairs: bfloat16, by a processor that has them."""
    if tensor.device.type != "cpu" or tensor.dtype != torch.bfloat16 or why_not_here() is not None:
        return False
    return bool(library().quasar_multiplies_pairs())


def library() -> ctypes.CDLL:
    """The compiled library; QuasarError where it cannot be built or loaded."""
    return _library_in(chosen())


@cache
def _library_in(form: Chosen) -> ctypes.CDLL:
    pointer, number = ctypes.c_void_p, ctypes.c_int
    return load_library(
        SOURCE,
        {
            "quasar_search_grids": [pointer] * 3 + [ctypes.c_int64] + [number] * 4 + [ctypes.c_float] * 2 + [number],
            "quasar_round_columns": [pointer] * 8 + [number] * 4,
            "quasar_descend_columns": [pointer] * 10 + [number] * 4,
            "quasar_multiplies_pairs": [],
            "quasar_attend_rows": [pointer] * 3 + [number] * 8 + [ctypes.c_float] * 2 + [number],
            "quasar_compare_logits": [pointer] * 4 + [ctypes.c_int64] + [number] * 2,
            "quasar_likeliest": [pointer] * 3 + [ctypes.c_int64] + [number] * 3,
            "quasar_draw": [pointer] * 3 + [ctypes.c_int64] + [number] * 2,
            "quasar_add_token_sums": [pointer] * 3 + [ctypes.c_int64] + [number] * 4,
            "quasar_add_product": [pointer, ctypes.c_int64] * 3 + [ctypes.c_int64] + [number] * 3,
        },
    )


def search_grids(
    groups: torch.Tensor, bits: int, sym: bool, steps: int, smallest: float, exponent: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros [n] of groups [n, size]: of the shrunk ranges, the one of least Σ |error|^exponent."""
    groups = groups.contiguous()
    scales, zeros = groups.new_empty(len(groups)), groups.new_empty(len(groups))
    numbers = (*groups.shape, bits, sym, steps, smallest, exponent, torch.get_num_threads())
    library().quasar_search_grids(groups.data_ptr(), scales.data_ptr(), zeros.data_ptr(), *numbers)
    return scales, zeros


def add_token_sums(left: torch.Tensor, right: torch.Tensor, sums: torch.Tensor, lower: bool = False) -> None:
    """Add Σ l rᵀ over tokens to sums [m, k] in float32; of left [n, m] and right [n, k], both bfloat16.

    With `lower` what lies above the diagonal is not whole.
    """
    left, right = left.contiguous(), right.contiguous()
    assert sums.is_contiguous()
    numbers = (len(left), *sums.shape, lower, torch.get_num_threads())
    library().quasar_add_token_sums(left.data_ptr(), right.data_ptr(), sums.data_ptr(), *numbers)


def add_product(left: torch.Tensor, right: torch.Tensor, sums: torch.Tensor) -> None:
    """Add leftᵀ · right to sums [m, n]; of left [k, m] and right [k, n], in float32; a row's numbers lie together."""
    matrices = (left, right, sums)
    assert all(matrix.dtype == torch.float32 and 1 in (matrix.stride(1), matrix.shape[1]) for matrix in matrices)
    places = (number for matrix in matrices for number in (matrix.data_ptr(), matrix.stride(0)))
    library().quasar_add_product(*places, len(left), *sums.shape, torch.get_num_threads())


def attends_rows(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `attend_rows` takes tensors of this kind, here; heads are of a multiple of `LANES` numbers."""
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and why_not_here() is None


def attend_rows(
    queries: torch.Tensor, states: torch.Tensor, first: int, end: int, scale: float | None, cap: float | None
) -> torch.Tensor:
    """Attend as `models/decoder/rows.py` does, in float32 or bfloat16; scaled queries are rounded to their dtype."""
    queries = queries.contiguous()
    assert states.is_contiguous()
    _, texts, heads, room, size = states.shape
    mixed = torch.empty_like(queries)
    sizes = (texts, heads, queries[0].numel() // (heads * size), size, room, first, end - 1)
    pointers = (each.data_ptr() for each in (queries, states, mixed))
    numbers = (scale or size**-0.5, cap or 0.0, torch.get_num_threads())
    library().quasar_attend_rows(*pointers, queries.dtype == torch.bfloat16, *sizes, *numbers)
    return mixed.view(texts, -1)


@dataclass(frozen=True)
class Compared:
    """How rows of logits differ, [T] each: KL in nats, Σ min(p, q), −log of a token's chance, best tokens; a margin."""

    kl: torch.Tensor
    overlap: torch.Tensor
    target_nll: torch.Tensor
    verifier_nll: torch.Tensor
    target_best: torch.Tensor
    verifier_best: torch.Tensor
    margin: torch.Tensor


def compare_logits(target: torch.Tensor, verifier: torch.Tensor, tokens: torch.Tensor) -> Compared:
    """Compare logits [T, V] of both, and how likely each finds the tokens [T]."""
    target, verifier, tokens = target.contiguous(), verifier.contiguous(), tokens.contiguous()
    found = target.new_empty(len(target), len(fields(Compared)))
    pointers = (tensor.data_ptr() for tensor in (target, verifier, tokens, found))
    library().quasar_compare_logits(*pointers, *target.shape, torch.get_num_threads())
    return Compared(*found.unbind(dim=1))


def likeliest(logits: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the `width` likeliest tokens of rows of logits [T, V], best first, and their chances, both [T, width]."""
    logits = logits.contiguous()
    tokens = torch.empty(len(logits), width, dtype=torch.int64)
    chances = logits.new_empty(len(logits), width)
    pointers = (tensor.data_ptr() for tensor in (logits, tokens, chances))
    library().quasar_likeliest(*pointers, *logits.shape, width, torch.get_num_threads())
    return tokens, chances


def draw(logits: torch.Tensor, chances: torch.Tensor) -> torch.Tensor:
    """Draw a token of each row of logits [T, V]: where its softmax's running sum passes its chance [T], in [0, 1)."""
    logits, chances = logits.contiguous(), chances.to(torch.double).contiguous()
    tokens = torch.empty(len(logits), dtype=torch.int64)
    pointers = (tensor.data_ptr() for tensor in (logits, chances, tokens))
    library().quasar_draw(*pointers, *logits.shape, torch.get_num_threads())
    return tokens


@dataclass(frozen=True)
class Columns:
    """A block of columns in the order of the visit, and the grid [G, r] that they are rounded to, all contiguous.

    `groups` [C] int32 are the columns' groups. Where `backwards`, blocks of a piece lie in memory the other way round.
    """

    scales: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    groups: torch.Tensor
    backwards: bool = False

    def round(self, weight: torch.Tensor, kernel: torch.Tensor, steps: torch.Tensor, errors: torch.Tensor) -> None:
        """Round weight [C, r], each column's error times `kernel` [C, C] taken off those visited later.

        Fills steps and errors [C, r].
        """
        pieces = [self._first(weight), kernel.data_ptr(), *self._grid(), self._first(steps), self._first(errors)]
        library().quasar_round_columns(*pieces, *self._sizes(weight))

    def descend(
        self,
        gradient: torch.Tensor,
        kernel: torch.Tensor,
        curvature: torch.Tensor,
        steps: torch.Tensor,
        moves: torch.Tensor,
        gains: torch.Tensor,
    ) -> None:
        """Move steps [C, r] down the gradient [C, r] in turn; `kernel` [C, C] is −H, `curvature` [C] its diagonal.

        Fills moves [C, r] and adds the losses' changes to gains [r].
        """
        pieces = [self._first(gradient), kernel.data_ptr(), curvature.data_ptr(), *self._grid()]
        pieces += [self._first(steps), self._first(moves), gains.data_ptr()]
        library().quasar_descend_columns(*pieces, *self._sizes(gradient))

    def _grid(self) -> list[int]:
        return [tensor.data_ptr() for tensor in (self.scales, self.low, self.high, self.groups)]

    def _first(self, block: torch.Tensor) -> int:
        """The address of the column that is visited first."""
        assert block.is_contiguous()
        return block[-1 if self.backwards else 0].data_ptr()

    def _sizes(self, block: torch.Tensor) -> tuple[int, int, int, int]:
        count, outputs = block.shape
        return count, outputs, -outputs if self.backwards else outputs, torch.get_num_threads()
