"""Which device and dtype a model gets; no GPU is here, so PyTorch's answers are written by hand."""

from typing import Any

import pytest
import torch

from quasar_core.errors import UsageError
from quasar_core.kernels import gpu
from quasar_core.models.device import choose_device, choose_dtype

CUDA = torch.device("cuda", 1)


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Two GPUs, the first of them current; what is made current later."""
    made: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    return made


@pytest.mark.parametrize(("asked", "number"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_gpu_has_its_number_and_is_made_current(current: list[Any], asked: str, number: int) -> None:
    """Triton launches on the current device, whatever its tensors are on."""
    assert choose_device(asked) == torch.device("cuda", number)
    assert current == [torch.device("cuda", number)]


def test_what_is_no_gpu_is_not_made_current(current: list[Any]) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="there are 2 CUDA devices"):
        choose_device("cuda:2")
    assert not current


def test_launches_go_to_the_device_of_a_pass_in_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device", entered.append)
    gpu.on(CUDA)
    with gpu.on(torch.device("cpu")):
        assert entered == [CUDA]


@pytest.mark.parametrize(
    ("capability", "hip", "stored", "expected"),
    [
        ((7, 5), None, "bfloat16", torch.float16),
        ((8, 0), None, "bfloat16", torch.bfloat16),
        ((7, 5), None, None, torch.float16),
        ((7, 5), None, "float32", torch.float32),
        ((7, 5), "6.4", "bfloat16", torch.bfloat16),
    ],
)
def test_gpus_before_ampere_compute_in_float16(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, stored: str | None, expected: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert choose_dtype("auto", stored, 10**10, CUDA)[0] == expected
    assert choose_dtype("bfloat16", stored, 10**10, CUDA)[0] == torch.bfloat16


def test_a_lost_device_is_told_and_nothing_else_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("an illegal memory access was encountered")
    gpu.raise_if_lost(error)  # no GPU is in use
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    gpu.raise_if_lost(error)  # it answers

    def synchronize() -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(ValueError, match="illegal memory access"):
        gpu.raise_if_lost(ValueError("illegal memory access, as its own kernel put it"))


def test_an_error_is_told_in_a_line() -> None:
    assert gpu.first_line(RuntimeError("\n first\nsecond")) == "first"
    assert gpu.first_line(KeyError()) == "KeyError"
