"""Codes without any text: every weight to the nearest, by the whole tool."""

import json
from pathlib import Path

import pytest
import torch
from helpers.plan_cases import LEAN
from helpers.quantize_cases import CONFIG, quantize, save_model, tensors_of

from quasar_core.api import decoding, quantizing
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.config import GenerationConfig, QuantizeConfig
from quasar_core.errors import UsageError
from quasar_core.quantize import calibration, commits
from quasar_core.quantize.blocks import rounding
from quasar_core.quantize.blocks.rounding import rounded
from quasar_core.quantize.plan import Shape, activation_bytes, batch_bytes
from quasar_core.quantize.solve.gptq import SolverConfig
from quasar_core.quantize.work import count_work

NEAREST = QuantizeConfig(group_size=32, samples=6, seq_len=24, rounding="nearest", lm_head_bits=8)


@pytest.fixture(autouse=True)
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "HELD_OUT_ROWS", 3)
    monkeypatch.setattr(calibration, "GREEDY_LENGTH", 40)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("columns", [64, 72])  # of groups of 32, the last one may be short
def test_no_code_of_a_weight_is_nearer(sym: bool, columns: int) -> None:
    weight = torch.randn(16, columns, generator=torch.Generator().manual_seed(0))
    found = rounded(weight, SolverConfig(4, 32, sym))
    error = (found.dequantize() - weight).abs()
    index = found.g_idx.long()
    scales, zeros = found.scales.float()[index].t(), found.zeros.float()[index].t()
    every = (torch.arange(16)[:, None, None] - zeros) * scales
    assert torch.equal(error, (every - weight).abs().amin(0))


def test_a_verifier_without_text(tmp_path: Path) -> None:
    source = save_model(tmp_path / "tiny", tied=False)
    report = quantize(source, NEAREST, output=tmp_path / "nearest")
    checkpoint, weights = VerifierCheckpoint(tmp_path / "nearest"), tensors_of(source)
    assert "lm_head" in checkpoint.layer_names
    for name in checkpoint.layer_names:
        bits = 8 if name == "lm_head" else 4
        expected = rounded(weights[f"{name}.weight"].float(), SolverConfig(bits, 32)).dequantize()
        assert torch.equal(checkpoint.layer(name).dequantize(), expected)
        loss = (expected - weights[f"{name}.weight"].float()).norm() / weights[f"{name}.weight"].float().norm()
        assert report.layer_errors[name] == pytest.approx(float(loss) ** 2, rel=1e-3)
    card = json.loads((tmp_path / "nearest" / "quasar.json").read_text())
    assert card["calibration"]["tokens"] == 0
    text = (tmp_path / "nearest" / "README.md").read_text()
    assert "--rounding nearest" in text
    assert "--damp" not in text
    assert "No text was read for the codes" in text
    assert "rounded to nearest, 4 bits, groups of 32, symmetric" in text
    assert 0 < report.fidelity.agreement <= 1


def test_the_text_is_the_models_own(tmp_path: Path) -> None:
    source = save_model(tmp_path / "tiny", tied=True)
    quantize(source, NEAREST, output=tmp_path / "nearest")
    pair = decoding.load_pair(str(source), str(tmp_path / "nearest"), device="cpu")
    plain, exact = (
        decoding.Generator(pair, GenerationConfig(40, verify, draft)).generate([5, 9, 12, 7]).token_ids
        for verify, draft in (("full", "none"), ("exact", "auto"))
    )
    assert plain == exact


def test_a_run_that_ends_between_blocks_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_model(tmp_path / "tiny", tied=False)
    quantize(source, NEAREST, output=tmp_path / "whole")
    written = list[str]()

    def write(path: Path, *content: object) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path.name)
        commits.write_commit(path, *content)  # type: ignore[arg-type]

    monkeypatch.setattr(rounding, "write_commit", write)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, NEAREST, output=tmp_path / "parts")
    monkeypatch.setattr(
        rounding, "write_commit", lambda *all_: (written.append(all_[0].name), commits.write_commit(*all_))
    )
    quantize(source, NEAREST, output=tmp_path / "parts")
    assert written == ["block-00000.safetensors", "block-00001.safetensors", "head.safetensors"]
    whole, parts = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_successors_are_counted_later(tmp_path: Path) -> None:
    source = save_model(tmp_path / "tiny", tied=False)
    quantize(source, NEAREST, output=tmp_path / "nearest")
    assert not (tmp_path / "nearest" / "successors.tensors").exists()
    quantizing.add_successors(str(source), NEAREST, output=tmp_path / "nearest", device="cpu")
    assert (tmp_path / "nearest" / "successors.tensors").exists()


def test_a_plan_counts_no_text() -> None:
    layers = {f"model.layers.{i}.mlp.{name}": (64, 64) for i in range(4) for name in ("up_proj", "down_proj")}
    shape = Shape(layers, other_weights=100, ends_weights=100, hidden=64, vocabulary=300, token=64)
    little, much = (count_work(shape, config, 8, LEAN) for config in (NEAREST, CONFIG))
    assert little.sums == 0 < much.sums
    assert little.matrices < much.matrices
    assert little.passes < much.passes
    assert activation_bytes(shape, NEAREST) == 0 < activation_bytes(shape, CONFIG)
    assert batch_bytes(shape, NEAREST, on_device=False) > 0  # of the text that fidelity is measured by


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mean_bits": 4.5}, "reads no text, and widths by layer are chosen by it"),
        ({"target_agreement": 0.9}, "reads no text, and widths by layer are chosen by it"),
        ({"backend": "optimum"}, "goes with --backend native"),
    ],
)
def test_what_needs_text_is_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        QuantizeConfig(rounding="nearest", **options)  # type: ignore[arg-type]
