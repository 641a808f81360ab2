"""Uploads put every piece in its place, and tell what fails."""

import pytest
import torch

from quasar_core.models.weights import upload
from quasar_core.models.weights.upload import Upload

CPU = torch.device("cpu")


@pytest.mark.parametrize("piece_bytes", [64, 1000, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_arrive_whole(piece_bytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "PIECE_BYTES", piece_bytes)
    stored = [torch.randn(shape) for shape in ((7, 33), (1,), (200, 3), (5,))]
    whole = torch.full((8, 33), torch.nan, dtype=dtype)
    places = [whole[:7], torch.empty(1, dtype=dtype), torch.empty(200, 3, dtype=dtype), torch.empty(4, 5, dtype=dtype)]
    with Upload(CPU) as uploading:
        for place, tensor in zip(places, stored, strict=True):
            uploading.copy(place, tensor)
    for place, tensor in zip(places[:3], stored[:3], strict=True):
        assert torch.equal(place, tensor.to(dtype))
    assert torch.equal(places[3], stored[3].to(dtype).expand(4, 5))
    assert torch.isnan(whole[7]).all()


def test_what_fails_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Upload, target: torch.Tensor, source: torch.Tensor) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(Upload, "_copy_piece", fail)
    with pytest.raises(OSError, match="the disk is gone"), Upload(CPU) as uploading:
        uploading.copy(torch.empty(3), torch.ones(3))
