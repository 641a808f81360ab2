"""Packing: round trips for every width, one tensor of each kind packed by hand, and what a reader must refuse."""

import pytest
import torch
from helpers.packed_weights import make_weight, random_codes
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.checkpoint.gptq_format import (
    QuantizedWeight,
    codes_per_period,
    count_groups,
    pack_columns,
    pack_rows,
    trivial_groups,
    unpack_columns,
    unpack_rows,
    unpack_weight,
    why_not_packable,
)
from quasar_core.errors import QuasarError

BITS = st.sampled_from((2, 3, 4, 8))


@settings(max_examples=60, deadline=None)
@given(bits=BITS, periods=st.integers(1, 5), other=st.integers(1, 13), seed=st.integers(0, 10_000))
def test_packing_along_either_side_is_undone_by_unpacking(bits: int, periods: int, other: int, seed: int) -> None:
    size = periods * codes_per_period(bits)
    codes = random_codes(bits, size, other, seed)
    words = pack_rows(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (size * bits // 32, other)
    assert torch.equal(unpack_rows(words, bits), codes)
    columns = pack_columns(codes.t(), bits)
    assert columns.shape == (other, size * bits // 32)
    assert torch.equal(unpack_columns(columns, bits), codes.t())


@settings(max_examples=40, deadline=None)
@given(
    bits=BITS,
    inputs=st.integers(1, 6),
    outputs=st.integers(1, 3),
    group_size=st.sampled_from((32, 64, 128, -1)),
    seed=st.integers(0, 10_000),
)
def test_a_layer_is_read_back_as_it_was_packed(
    bits: int, inputs: int, outputs: int, group_size: int, seed: int
) -> None:
    """Odd sizes too: the last group may be short, and the only group larger than the layer."""
    period = codes_per_period(bits)
    weight = make_weight(bits, inputs * period, outputs * period, group_size, seed)
    again = unpack_weight("layer", weight.pack(), bits, group_size, zeros_offset=1)
    for field in ("codes", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(again, field), getattr(weight, field)), field
    assert torch.equal(again.dequantize(), weight.dequantize())


def test_codes_that_do_not_fill_words_are_a_defect_of_the_caller() -> None:
    with pytest.raises(ValueError, match="12 rows of 4-bit codes do not fill whole words: use a multiple of 8"):
        pack_rows(torch.zeros(12, 1), 4)


@pytest.mark.parametrize(
    ("bits", "column", "words"),
    [
        # Code i at bits 2i and 2i + 1; sixteen codes 0, 1, 2, 3, 0, …: every byte is 3·64 + 2·16 + 1·4 + 0 = 0xE4.
        # 0xE4E4E4E4 = 3,840,206,052, and as a signed word that less 2³².
        (2, [0, 1, 2, 3] * 4, [3_840_206_052 - 2**32]),
        # Eight codes 1 to 8, the first in the lowest half byte: 0x87654321 = 2,271,560,481.
        (4, [1, 2, 3, 4, 5, 6, 7, 8], [2_271_560_481 - 2**32]),
        # Four codes, a byte each, the first lowest: 0x7F020100 + 0x01 in the first = 0x7F020101.
        (8, [0x01, 0x01, 0x02, 0x7F], [0x7F020101]),
        # Three words hold 32 codes of 3 bits as one stream, lowest bit first. Code 0 = 5 (101) is bits 0 to 2;
        # code 10 = 6 (110) is bits 30 to 32: its low bits 10 end word 0 (bit 31), its high bit begins word 1 (bit 0);
        # code 21 = 3 (011) is bits 63 to 65: its low bit ends word 1 (bit 31), 01 begins word 2 (bit 0);
        # code 31 = 7 is bits 29 to 31 of word 2. All others are 0.
        (
            3,
            [5] + [0] * 9 + [6] + [0] * 10 + [3] + [0] * 9 + [7],
            [5 + 2**31 - 2**32, 1 + 2**31 - 2**32, 1 + 7 * 2**29 - 2**32],
        ),
    ],
)
def test_qweight_packed_by_hand(bits: int, column: list[int], words: list[int]) -> None:
    codes = torch.tensor(column)[:, None]
    assert pack_rows(codes, bits).tolist() == [[word] for word in words]
    assert unpack_rows(torch.tensor(words, dtype=torch.int32)[:, None], bits).flatten().tolist() == column


def test_every_tensor_of_a_layer_by_hand() -> None:
    """16 inputs in groups of 8, 8 outputs, 4 bits. Output o has zero o + 1 in group 0 and 8 in group 1."""
    codes = torch.zeros(16, 8, dtype=torch.uint8)
    codes[0, 0], codes[7, 0], codes[8, 0], codes[15, 7] = 1, 2, 3, 9
    zeros = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [8] * 8], dtype=torch.int32)
    scales = torch.tensor([[0.5] * 8, [2.0] * 8], dtype=torch.float16)
    weight = QuantizedWeight(4, 8, codes, scales, zeros, trivial_groups(16, 8))
    packed = weight.pack()
    # Output 0: word 0 has code 1 at bit 0 and code 2 at bit 28, word 1 code 3 at bit 0. Output 7: word 1, code 9 at 28.
    assert packed["qweight"].tolist() == [
        [1 + 2 * 2**28, 0, 0, 0, 0, 0, 0, 0],
        [3, 0, 0, 0, 0, 0, 0, 9 * 2**28 - 2**32],
    ]
    # Stored as zero − 1: 0, 1, …, 7 from the lowest half byte up, 0x76543210; and eight times 7, 0x77777777.
    assert packed["qzeros"].tolist() == [[0x76543210], [0x77777777]]
    assert packed["scales"].tolist() == [[0.5] * 8, [2.0] * 8]
    assert packed["g_idx"].tolist() == [0] * 8 + [1] * 8
    # scale · (code − zero): output 0 has zero 1 in group 0; input 8 of output 0 is in group 1.
    dense = weight.dequantize()
    assert dense.shape == (8, 16)
    assert dense[0, 0] == 0.5 * (1 - 1)
    assert dense[0, 7] == 0.5 * (2 - 1)
    assert dense[0, 8] == 2.0 * (3 - 8)
    assert dense[7, 15] == 2.0 * (9 - 8)
    assert dense[3, 1] == 0.5 * (0 - 4)


def test_version_1_reads_zeros_plus_one_and_version_2_as_they_are() -> None:
    weight = make_weight(4, 32, 16, 32)
    tensors = weight.pack()
    assert torch.equal(unpack_weight("x", tensors, 4, 32, zeros_offset=0).zeros, weight.zeros - 1)
    assert torch.equal(unpack_weight("x", tensors, 4, 32, zeros_offset=1).zeros, weight.zeros)


def test_a_zero_of_0_has_no_place_in_version_1() -> None:
    weight = make_weight(4, 32, 16, 32)
    weight.zeros[0, 0] = 0
    with pytest.raises(ValueError, match="cannot store a zero of 0"):
        weight.pack()


def test_groups_that_are_not_in_order_are_read_and_told_apart() -> None:
    weight = make_weight(4, 64, 8, 32)
    assert weight.has_trivial_groups
    tensors = weight.pack()
    tensors["g_idx"] = tensors["g_idx"].flip(0)
    again = unpack_weight("x", tensors, 4, 32, zeros_offset=1)
    assert not again.has_trivial_groups
    expected = weight.scales.float()[1] * (weight.codes[0].float() - weight.zeros[1].float())
    assert torch.equal(again.dequantize()[:, 0], expected)


def test_a_missing_g_idx_means_groups_in_order() -> None:
    weight = make_weight(2, 64, 16, 32)
    tensors = weight.pack()
    del tensors["g_idx"]
    assert torch.equal(unpack_weight("x", tensors, 2, 32, zeros_offset=1).g_idx, weight.g_idx)


@pytest.mark.parametrize(
    ("name", "replacement", "sentence"),
    [
        ("qweight", None, "layer l has no qweight"),
        ("qzeros", None, "layer l has no qzeros"),
        ("scales", None, "layer l has no scales"),
        ("scales", torch.ones(3, 16), r"layer l has scales of shape \(3, 16\), not \(2, 16\)"),
        ("qzeros", torch.zeros(2, 1, dtype=torch.int32), r"layer l has qzeros of shape \(2, 1\), not \(2, 2\)"),
        ("g_idx", torch.zeros(63, dtype=torch.int32), r"layer l has g_idx of shape \(63,\), not \(64,\)"),
        ("g_idx", torch.full((64,), 2, dtype=torch.int32), "layer l has a g_idx outside its 2 groups"),
        ("g_idx", torch.full((64,), -1, dtype=torch.int32), "layer l has a g_idx outside its 2 groups"),
        ("scales", torch.full((2, 16), float("nan")), "layer l has scales that are not finite"),
        ("scales", torch.full((2, 16), float("inf")), "layer l has scales that are not finite"),
        (
            "qweight",
            torch.zeros(8, 12, dtype=torch.int32),
            r"layer l has qweight of shape \(8, 12\), which 4-bit codes",
        ),
        ("qweight", torch.zeros(8, dtype=torch.int32), r"layer l has qweight of shape \(8,\), which 4-bit codes"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name: str, replacement: torch.Tensor | None, sentence: str) -> None:
    tensors = make_weight(4, 64, 16, 32).pack()
    if replacement is None:
        del tensors[name]
    else:
        tensors[name] = replacement
    with pytest.raises(QuasarError, match=sentence):
        unpack_weight("l", tensors, 4, 32, zeros_offset=1)


def test_three_bit_words_come_in_threes() -> None:
    tensors = make_weight(3, 64, 32, 32).pack()
    tensors["qweight"] = tensors["qweight"][:-1]
    with pytest.raises(QuasarError, match=r"qweight of shape \(5, 32\), which 3-bit codes cannot fill"):
        unpack_weight("l", tensors, 3, 32, zeros_offset=1)


@pytest.mark.parametrize(
    ("size", "bits", "sentence"),
    [
        ((64, 64), 4, None),
        ((64, 48), 3, "48 outputs are not a multiple of 32, as 3-bit words need"),
        ((20, 64), 4, "20 inputs are not a multiple of 8, as 4-bit words need"),
        ((20, 64), 8, None),
        ((24, 64), 2, "24 inputs are not a multiple of 16, as 2-bit words need"),
    ],
)
def test_which_sizes_the_layout_holds(size: tuple[int, int], bits: int, sentence: str | None) -> None:
    assert why_not_packable(*size, bits) == sentence


def test_group_counts() -> None:
    assert [count_groups(100, size) for size in (32, 128, 50, -1)] == [4, 1, 2, 1]
    assert trivial_groups(5, 2).tolist() == [0, 0, 1, 1, 2]
    assert trivial_groups(3, -1).tolist() == [0, 0, 0]
