"""The comparison with GPTQModel: one text for both, one measure for both. Their side runs in tests/interop."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quasar_core.api import quantizing
from quasar_core.config import QuantizeConfig
from tools.compare_gptqmodel import compare_blocks, main

pytest_plugins = ["helpers.quantize_fixtures"]
ROWS = ("samples", "held_out", "greedy")


def test_a_run_goes_on_from_the_text_that_the_others_read_and_is_measured_as_it_measures_itself(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, ours = tmp_path / "work", tmp_path / "ours"
    main(["text", str(source), str(ours), str(folder), "--samples", "4", "--seq-len", "16"])
    report = quantizing.quantize(str(source), QuantizeConfig(samples=4, seq_len=16), output=ours, device="cpu")
    text = load_file(folder / "text.safetensors")
    card = json.loads((ours / "quasar.json").read_text())
    assert card["calibration"]["sha256"] == hashlib.sha256(text["samples"].numpy().tobytes()).hexdigest()
    assert json.loads((folder / "groups.json").read_text()) == {"group_size": report.config["group_size"]}

    main(["measure", str(source), str(folder), str(ours)])
    measured = json.loads((folder / "measured-ours.json").read_text())
    assert measured["fidelity"]["kl_mean"] == report.fidelity.kl_mean
    assert measured["fidelity"]["agreement"] == report.fidelity.agreement
    packed = {n: t.numel() * t.element_size() for n, t in load_file(ours / "model.safetensors").items()}
    suffixes = ("qweight", "qzeros", "scales", "g_idx")
    assert measured["packed_bytes"] == sum(size for name, size in packed.items() if name.endswith(suffixes))


def test_the_first_blocks_alone(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a block the model is itself; each quantized block costs fidelity, and bytes."""
    generator = torch.Generator().manual_seed(0)
    rows = {name: torch.randint(97, (4, 24 + 16 * (name == "greedy")), generator=generator) for name in ROWS}
    save_file(rows, tmp_path / "text.safetensors")
    (tmp_path / "groups.json").write_text('{"group_size": 32}')
    monkeypatch.chdir(tmp_path)
    none, one, two = (
        next(iter(compare_blocks(str(source), tmp_path, (), blocks=count, samples=3, rows=2))) for count in (0, 1, 2)
    )
    assert (none.name, none.packed_bytes, none.fidelity.kl_mean) == ("quasar", 0, 0.0)
    assert 0 < one.fidelity.kl_mean < two.fidelity.kl_mean
    assert two.packed_bytes == 2 * one.packed_bytes > 0


def test_the_table_begins_with_the_least_divergence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, kl in (("theirs", 0.25), ("ours", 0.125)):
        figures = {"kl_mean": kl, "kl_p99": 1, "agreement_sampled": 0.5, "agreement": 0.75}
        fidelity = {**figures, "perplexity_verifier": 9, "perplexity_target": 8}
        found = {"name": name, "packed_bytes": 1234, "fidelity": fidelity}
        (tmp_path / f"measured-{name}.json").write_text(json.dumps(found))
    main(["table", str(tmp_path)])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows == [
        "| ours | 0.1250 | 1.0000 | 0.5000 | 0.7500 | 9.000 | 1,234 |",
        "| theirs | 0.2500 | 1.0000 | 0.5000 | 0.7500 | 9.000 | 1,234 |",
        "",
        "The target's perplexity: 8.000.",
    ]
