"""Later chunks of a prompt on CUDA: the mask that flash attention takes says what the plain one says."""

import pytest
import torch

from quasar_core.models.decoder.attention import FOLDED_TOKENS, AttentionMask, attend, make_mask

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HEADS, GROUP, SIZE = 2, 3, 16


@pytest.mark.parametrize("start", [1, 40, 200])
def test_a_chunk_sees_what_it_sees_by_the_plain_mask(start: int) -> None:
    torch.manual_seed(start)
    count = FOLDED_TOKENS + 9
    queries = torch.randn(count, HEADS * GROUP, SIZE)
    states = torch.randn(2, HEADS, 300, SIZE)
    plain = make_mask(start, count, None, GROUP, CPU, torch.float32)
    flash = make_mask(start, count, None, GROUP, CUDA, torch.float32)
    assert flash.continues
    torch.testing.assert_close(attend(queries, states, flash), attend(queries, states, plain))


def test_what_needs_no_mask_or_one_of_its_own_keeps_it() -> None:
    first = make_mask(0, 64, None, GROUP, CUDA, torch.float32)
    assert first == AttentionMask(0, 64, causal=True, added=None)
    windowed = make_mask(40, 64, 16, GROUP, CPU, torch.float32)
    assert not windowed.continues
