"""What a target costs that is streamed beside verifiers of any size: against plans of real pairs, and by arithmetic."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.decoder_cases import CASES, CPU, save_model
from helpers.quantized_decoder import quantize_layers
from hypothesis import given
from hypothesis import strategies as st

from quasar_core.bench.verifiers.streamed_target import ConfirmCost, StreamedPasses, StreamedTarget, measure_streamed
from quasar_core.config import LoadOptions
from quasar_core.decode.costs.pass_costs import PassCost
from quasar_core.models.memory import offload
from quasar_core.models.memory.estimate import stored_bytes
from quasar_core.models.memory.offload import plan_offload
from quasar_core.models.pair import Pair

BF16 = torch.bfloat16
OWN, FREE = 10_000_000, 10_000_000_000


@pytest.fixture(autouse=True)
def _memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a machine that does not change."""
    monkeypatch.setattr(offload, "own_memory", lambda: OWN)
    monkeypatch.setattr(offload, "free_memory", lambda: FREE)


@given(st.floats(0, 1), st.lists(st.floats(0.01, 9), min_size=2, max_size=2))
def test_a_pass_takes_as_long_as_the_longer_of_computing_and_reading(share: float, seconds: list[float]) -> None:
    low, high = sorted(seconds)
    passes = StreamedPasses(PassCost((1, 257), (low, high)), 1_000_000, 250_000.0)
    confirm = passes.confirm(share)
    reading = int(share * 1_000_000) / 250_000
    assert confirm.moved == int(share * 1_000_000)
    assert confirm.cost(1) == max(low, reading)
    assert confirm.cost(257) == max(high, reading)


@pytest.mark.parametrize(("less", "streamed"), [(0, 0), (20_000, 3), (100_000, 4)])
def test_shares_are_those_of_the_pair_that_decodes(tmp_path: Path, less: int, streamed: int) -> None:
    """Of blocks of 61,440 bytes, two of which are buffers: by its bytes alone, as beside a verifier that is made."""
    save_model(tmp_path, *CASES["llama"]).to(BF16).save_pretrained(tmp_path)
    checkpoint = quantize_layers(tmp_path, tmp_path / "verifier", lambda name: 8 if "_proj" in name else 16)
    codes = stored_bytes(checkpoint)
    target = StreamedTarget.of(tmp_path, BF16, 100, False, None)
    whole = replace(target.need, verifier=codes).total(100)
    allowed = OWN + whole + offload.LEAST_RESERVE - less
    target = StreamedTarget.of(tmp_path, BF16, 100, False, allowed)
    plan = plan_offload(tmp_path, checkpoint, BF16, 100, LoadOptions(max_memory=allowed))
    found = target.plan(codes)
    assert (found and sorted(found.streamed)) == (plan and sorted(plan.streamed))
    moved = len(plan.streamed) if plan else 0
    assert moved == streamed
    assert target.share(codes) == streamed / 4


def test_a_larger_verifier_moves_more_and_one_that_is_too_large_does_not_fit(tmp_path: Path) -> None:
    save_model(tmp_path, *CASES["llama"]).to(BF16).save_pretrained(tmp_path)
    need = StreamedTarget.of(tmp_path, BF16, 100, False, None).need
    target = StreamedTarget.of(tmp_path, BF16, 100, False, OWN + need.total(100) + offload.LEAST_RESERVE)
    assert [target.share(codes) for codes in (0, 60_000, 100_000, 1_000_000)] == [0.0, 0.75, 1.0, None]
    assert StreamedTarget.of(tmp_path, BF16, 100, True, None).share(0) == 1.0


def test_streamed_passes_are_timed(tmp_path: Path) -> None:
    """By a clock that counts: all bytes of a pass, and at two sizes at least what computing takes."""
    save_model(tmp_path, "Qwen3", {"head_dim": 32, "max_position_embeddings": 400})
    plan = plan_offload(tmp_path, None, torch.float32, 400, LoadOptions(verify="full", offload="target"))
    from quasar_core.models.loading import load_models

    target = load_models(tmp_path, None, CPU, torch.float32, offload=plan).target
    pair = Pair.__new__(Pair)
    object.__setattr__(pair, "target", target)
    object.__setattr__(pair, "max_context", 400)
    clock = iter(range(100))
    found = measure_streamed(pair, now=lambda: float(next(clock)))
    assert found.computing.sizes == (1, 65, 257)
    assert all(0 < seconds <= 1 for seconds in found.computing.seconds)
    assert found.pass_bytes == target.source.pass_bytes > 0
    assert found.bandwidth > 0
    assert isinstance(found.confirm(0.5), ConfirmCost)
