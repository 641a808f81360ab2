"""Launches overlap where that is faster and changes nothing, and what decided it is told."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import CPU, FLOAT, save_model

from quasar_core.models.cuda import overlap
from quasar_core.models.cuda.graph_pass import CudaPass
from quasar_core.models.cuda.overlap import ROUNDS, choose_overlap
from quasar_core.models.cuda.torch_steps import TorchSteps
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.weights.lean_weights import load_target


@pytest.fixture
def decoder(tmp_path: Path) -> LeanDecoder:
    save_model(tmp_path, "Llama", {"num_hidden_layers": 1})
    return load_target(tmp_path, CPU, FLOAT)


class Wrong(TorchSteps):
    """Steps of which every third pass of one token comes out differently, as where a launch began too soon."""

    def __init__(self) -> None:
        self.passes = 0

    def gated(self, gate_up: torch.Tensor, *given: Any) -> torch.Tensor:
        self.passes += len(gate_up) == 1
        gated = super().gated(gate_up, *given)
        assert isinstance(gated, torch.Tensor)
        return gated * 1.01 if len(gated) == 1 and self.passes % 3 == 0 else gated


class Failing(TorchSteps):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def gated(self, gate_up: torch.Tensor, *given: Any) -> torch.Tensor:
        raise self.error


@pytest.mark.parametrize("faster", [True, False])
def test_the_faster_pass_is_taken(decoder: LeanDecoder, faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    times = [2e-3, 1e-3] if faster else [1e-3, 2e-3]
    monkeypatch.setattr(overlap, "time_passes", lambda passes, cache: times)
    apart, joined = TorchSteps(), TorchSteps()
    chosen, why = choose_overlap(CudaPass(decoder, apart), joined)
    assert chosen.steps is (joined if faster else apart)
    if faster:
        assert why == "launches overlap: 1000 µs for passes of 1 and 8, 2000 without"
    else:
        assert why == "launches do not overlap: with it 2000 µs for passes of 1 and 8, 1000 without"


def test_both_are_timed(decoder: LeanDecoder) -> None:
    chosen, why = choose_overlap(CudaPass(decoder, TorchSteps()), TorchSteps())
    assert chosen.decoder is decoder
    assert "µs" in why


def test_a_pass_that_comes_out_differently_is_not_taken(decoder: LeanDecoder) -> None:
    plain = TorchSteps()
    chosen, why = choose_overlap(CudaPass(decoder, plain), Wrong())
    assert chosen.steps is plain
    assert why.endswith(f"of {2 * ROUNDS} passes differed")
    assert not why.startswith("launches do not overlap: 0")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("CUDA error: not permitted\nwhen capturing"), "CUDA error: not permitted"),
        (KeyError("Keyword argument launch_pdl was specified but unrecognised"), "'Keyword argument launch_pdl"),
    ],
)
def test_a_pass_that_fails_is_not_taken(decoder: LeanDecoder, error: Exception, reason: str) -> None:
    plain = TorchSteps()
    chosen, why = choose_overlap(CudaPass(decoder, plain), Failing(error))
    assert chosen.steps is plain
    assert why.startswith(f"launches do not overlap: it failed here ({reason}")
