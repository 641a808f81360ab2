"""Memory in huge pages: tensors that do not overlap, each with its own storage, changed in any mode."""

import mmap

import pytest
import torch

from quasar_core.kernels.cpu import huge_pages
from quasar_core.kernels.cpu.huge_pages import empty_in_huge_pages

SIZES = [(1,), (3, 5), (130, 100), (64, 1024), (1000, 1000), (3000, 3000), (0, 4)]


@pytest.mark.parametrize("advice", [True, False])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_tensors_lie_apart_and_hold_what_is_written(
    monkeypatch: pytest.MonkeyPatch, advice: bool, dtype: torch.dtype
) -> None:
    if not advice:
        monkeypatch.setattr(huge_pages, "_ADVICE", None)  # as on other systems than Linux
    tensors = [empty_in_huge_pages(*shape, dtype=dtype) for shape in SIZES * 3]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    for number, (tensor, shape) in enumerate(zip(tensors, SIZES * 3, strict=True)):
        assert tensor.shape == shape
        assert tensor.is_contiguous()
        assert (tensor == number).all()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * dtype.itemsize


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="Linux alone has huge pages by advice")
def test_small_tensors_share_a_room_at_whole_cache_lines() -> None:
    first, second = (empty_in_huge_pages(100, 101, dtype=torch.bfloat16) for _ in range(2))
    if second.data_ptr() < first.data_ptr() or second.data_ptr() - first.data_ptr() > 1 << 20:  # a new room began
        first, second = second, empty_in_huge_pages(100, 101, dtype=torch.bfloat16)
    assert second.data_ptr() - first.data_ptr() == 20224  # 20,200 bytes, up to a multiple of 64
    assert second.data_ptr() % 64 == 0


def test_what_is_made_in_inference_mode_can_be_changed_outside() -> None:
    with torch.inference_mode():
        tensor = empty_in_huge_pages(1000, 100, dtype=torch.float32)
        tensor.fill_(1)
    tensor += 1
    assert (tensor == 2).all()
