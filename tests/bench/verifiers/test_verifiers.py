"""Which verifier is best here: figures from costs written by hand, for verifiers of a tiny target on the disk."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import CPU, save_model
from helpers.quantized_decoder import quantize_layers
from helpers.stand_ins import FIDELITY
from helpers.tiny_models import TableModel, make_pair

from quasar_cli.main import run
from quasar_core import store
from quasar_core.bench.verifiers.compare_verifiers import compare_verifiers
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.decode.costs import cost_records
from quasar_core.decode.costs.cost_records import pair_costs
from quasar_core.decode.costs.pass_costs import PairCosts, PassCost
from quasar_core.decode.policy.lengths import predict_rates
from quasar_core.errors import QuasarError
from quasar_core.kernels import select, times
from quasar_core.kernels.dense import DenseKernel
from quasar_core.timing import Timing

TARGET = PassCost((1, 33), (10e-3, 42e-3))  # a millisecond for every further token
VERIFIER = PassCost((1, 33), (2e-3, 18e-3))
KERNEL_SECONDS = {4: 1e-5, 8: 3e-5}  # of any product of this width, at any rows
Measure = Callable[..., None]


class AnyCodes(DenseKernel):
    """A packed kernel that needs nothing of this machine."""

    name = "any-codes"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A target, and its 4-bit verifier with a fidelity report, recorded as the current pair."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(select, "SMALLEST", 0)
    monkeypatch.setattr(select, "PACKED_KERNELS", (AnyCodes(),))
    monkeypatch.setattr(times, "time_kernel", lambda kernel, shape, *_: dict.fromkeys((1, 4, 8), time_of(shape.bits)))
    save_model(tmp_path / "target", "Qwen3", {"head_dim": 32})
    verifier = quantize_layers(tmp_path / "target", tmp_path / "v4", lambda name: 16 if "lm_head" in name else 4)
    card = {
        "target": {"name": "target", "fingerprint": store.fingerprint(tmp_path / "target")},
        "report": {"fidelity": asdict(FIDELITY), "layer_errors": {}},
    }
    (verifier.folder / "quasar.json").write_text(json.dumps(card))
    store.record_pair(str(tmp_path / "target"), verifier.folder)
    return verifier.folder


def time_of(bits: int) -> Timing:
    return Timing((KERNEL_SECONDS[bits],) * 3)


@pytest.fixture
def measure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Let a run have measured the pair: TARGET and VERIFIER."""

    def measured(dtype: torch.dtype = torch.bfloat16) -> None:
        pair = make_pair(TableModel(8, 0), TableModel(8, 1), dtype=dtype)
        pair.target_fingerprint = VerifierCheckpoint(folder).target_fingerprint
        pair.verifier_fingerprint = store.fingerprint(folder)
        monkeypatch.setattr(
            cost_records, "measure_pass", lambda pair, model, **_: (TARGET if model is pair.target else VERIFIER, None)
        )
        pair_costs(pair, with_verifier=True)

    return measured


def test_a_measured_verifier_has_the_rates_of_its_costs_and_margins(folder: Path, measure: Measure) -> None:
    measure()
    compared = compare_verifiers(VerifierCheckpoint(folder), CPU, 1e9)
    four = compared.verifiers[0]
    rates = predict_rates(PairCosts(VERIFIER, TARGET), FIDELITY.margins)
    assert (four.name, four.bits, four.agreement) == ("v4", 4, FIDELITY.agreement)
    assert (four.quantized, four.exact, four.exact_is_bound) == (rates.quantized, rates.exact, False)
    assert four.passes.ms == pytest.approx([2.0, 3.5, 5.5])
    assert compared.target.ms == pytest.approx([10.0, 13.0, 17.0])
    assert (compared.plain, compared.full) == (100.0, rates.full)
    assert (compared.dtype, compared.target.source) == ("bfloat16", "remembered from less than a minute ago")


def test_the_floor_counts_the_bytes_of_the_weights_that_a_pass_reads(folder: Path, measure: Measure) -> None:
    measure()
    compared = compare_verifiers(VerifierCheckpoint(folder), CPU, 1e9)
    blocks = 4 * (64 * (4 + 2 + 2) * 32 + 4 * 32 * 64 + 3 * 64 * 96)  # q, k, v; out; gate, up and down
    head = 64 * 96
    assert compared.target.floor_ms == pytest.approx((blocks + head) * 2 / 1e6)
    codes = blocks * 4 / 8 + blocks / 32 * (16 + 4) / 8  # a scale of 16 bits and a zero of 4 in groups of 32
    assert compared.verifiers[0].passes.floor_ms == pytest.approx((codes + head * 2) / 1e6)


def test_a_width_that_is_not_there_is_estimated_from_its_kernels(folder: Path, measure: Measure) -> None:
    """Sixteen products of 8 bits, each 20 µs slower than at 4; its margins are no worse than those of 4 bits."""
    measure()
    eight = compare_verifiers(VerifierCheckpoint(folder), CPU, 1e9).verifiers[1]
    assert (eight.name, eight.bits) == ("8 bits, not made yet", 8)
    assert eight.passes.ms == pytest.approx([2.0 + 0.32, 3.5 + 0.32, 5.5 + 0.32])
    assert eight.passes.source == "estimated from v4"
    assert (eight.agreement, eight.exact_is_bound) == (None, True)
    assert eight.quantized < compare_verifiers(VerifierCheckpoint(folder), CPU, 1e9).verifiers[0].quantized


def test_the_best_follows_the_rates(folder: Path, measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    measure()
    assert compare_verifiers(VerifierCheckpoint(folder), CPU, 1e9).best_quantized == "v4"
    monkeypatch.setitem(KERNEL_SECONDS, 8, 1e-6)
    times.forget_times()
    compared = compare_verifiers(VerifierCheckpoint(folder), CPU, 1e9)
    assert (compared.best_quantized, compared.best_exact) == ("8 bits, not made yet", "8 bits, not made yet")


def test_the_dtype_measured_last_is_shown_alone(folder: Path, measure: Measure) -> None:
    measure(torch.float32)
    measure(torch.bfloat16)
    compared = compare_verifiers(VerifierCheckpoint(folder), CPU, 1e9)
    assert compared.dtype == "bfloat16"
    assert [verifier.name for verifier in compared.verifiers] == ["v4", "8 bits, not made yet"]


def test_without_measured_passes_it_says_how_to_get_them(folder: Path) -> None:
    with pytest.raises(QuasarError, match="doctor --remeasure"):
        compare_verifiers(VerifierCheckpoint(folder), CPU, 1e9)


def test_inspect_shows_the_comparison(folder: Path, measure: Measure, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect"]) == 0
    assert "were not measured here yet" in capsys.readouterr().out
    measure()
    assert run(["inspect"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2, 3.5, 5.5" in shown
    assert "10, 13, 17" in shown
    assert "Best here, at a typical acceptance of n-gram drafts: quantized: v4; exact: " in shown
    assert run(["inspect", "--json"]) == 0
    speed: Any = json.loads(capsys.readouterr().out)["speed"]
    assert speed["best_quantized"] == "v4"
