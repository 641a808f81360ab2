"""`quasar quantize`, `models`, `inspect` and `doctor`: what is asked of the core, what is printed where."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from helpers.stand_ins import FIDELITY, type_lines
from helpers.verifier_cards import write_card

from quasar_cli.main import run
from quasar_core import store
from quasar_core.config import BITS
from quasar_core.records import FidelityReport

pytest_plugins = ["helpers.cli_fixtures"]
pytestmark = pytest.mark.usefixtures("own_home")

# quantize


def test_quantize_prints_a_summary(stand_in_quantize: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", "demo"]) == 0
    shown = capsys.readouterr()
    for fact in ("16.4 GB → 6.1 GB (2.69 times smaller)", "4.15", "0.9471 on greedy text", "0.0412 nats", "0.3100"):
        assert fact in shown.out
    for fact in ("5.123 target, 5.234 verifier", "/models/demo-gptq-4bit-g128", "12.0", "14.5"):
        assert fact in shown.out
    assert "layers.1.up_proj" not in shown.out
    assert "Next: quasar generate 'Why is the sky blue?'" in shown.err
    assert run(["quantize", "demo", "-v"]) == 0
    assert "layers.1.up_proj" in capsys.readouterr().out


def test_quantize_forwards_every_option(stand_in_quantize: dict[str, Any]) -> None:
    options = (
        "--bits 3 --group-size 64 --no-sym --no-act-order --method gptq --lm-head-bits 8 --calibration c4 --samples 5 "
        "--seq-len 99 --damp 0.1 --seed 4 --backend optimum --output out "
        "--force --no-resume --device cpu --trust-remote-code"
    )
    assert run(["quantize", "demo", *options.split()]) == 0
    values = [3, 64, False, False, "gptq", 8, "c4", 5, 99, 0.1, 4, "optimum", None, None, BITS, 32, "gptq"]
    assert list(vars(stand_in_quantize["config"]).values()) == values
    assert (stand_in_quantize["model"], stand_in_quantize["output"], stand_in_quantize["device"]) == (
        "demo",
        Path("out"),
        "cpu",
    )
    assert (stand_in_quantize["force"], stand_in_quantize["resume"], stand_in_quantize["trust_remote_code"]) == (
        True,
        False,
        True,
    )


def test_quantize_forwards_the_rounding_of_eight_bits(stand_in_quantize: dict[str, Any]) -> None:
    assert run(["quantize", "demo", "--method", "fp8", "--rounding", "nearest"]) == 0
    config = stand_in_quantize["config"]
    assert (config.method, config.rounding, config.bits, config.group_size) == ("fp8", "nearest", 8, -1)


@pytest.mark.parametrize(("count", "said"), [(1, False), (2, True)])
@pytest.mark.usefixtures("stand_in_quantize")
def test_quantize_says_that_one_of_several_gpus_is_used(
    count: int, said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    assert run(["quantize", "demo"]) == 0
    assert ("One of 2 GPUs is used (cuda:0)" in capsys.readouterr().err) == said


def test_quantize_json_is_the_report(stand_in_quantize: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", "demo", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["checkpoint"], document["config"]) == ("/models/demo-gptq-4bit-g128", {"bits": 4})
    assert (document["bytes_before"], document["bytes_after"]) == (16_400_000_000, 6_100_000_000)
    assert FidelityReport.from_dict(document["fidelity"]) == FIDELITY


# models, inspect, doctor


def _record(tmp_path: Path, name: str = "demo-gptq-4bit-g128") -> Path:
    folder = tmp_path / name
    folder.mkdir()
    write_card(folder)
    store.record_pair("demo", folder)
    return folder


def test_models_lists_and_switches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models"]) == 0
    assert "No pair is recorded yet" in capsys.readouterr().err
    _record(tmp_path, "first")
    _record(tmp_path, "second").joinpath("quasar.json").unlink()
    (tmp_path / "second").rmdir()
    assert run(["models"]) == 0
    rows = [row.split() for row in capsys.readouterr().out.splitlines()]
    assert ["first", "demo", str(tmp_path / "first")] in rows
    assert ["*", "second", "demo", str(tmp_path / "second"), "(missing)"] in rows
    assert run(["models", "use", "first"]) == 0
    assert "first is the current pair." in capsys.readouterr().err
    assert run(["models", "--json"]) == 0
    pairs = json.loads(capsys.readouterr().out)["pairs"]
    assert [(pair["name"], pair["target"], pair["current"]) for pair in pairs] == [
        ("first", "demo", True),
        ("second", "demo", False),
    ]


def test_models_remove_asks_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _record(tmp_path)
    for answer in ("n\n", ""):
        type_lines(monkeypatch, answer)
        assert run(["models", "remove", folder.name]) == 1
        assert "Nothing was removed" in capsys.readouterr().err
    assert folder.is_dir()
    type_lines(monkeypatch, "y\n")
    assert run(["models", "remove", folder.name]) == 0
    assert not folder.exists()
    assert store.list_pairs() == []


def test_models_remove_can_keep_the_files(tmp_path: Path) -> None:
    folder = _record(tmp_path)
    assert run(["models", "remove", folder.name, "--keep-files", "--yes"]) == 0
    assert folder.is_dir()
    assert store.list_pairs() == []


def _checkpoint(folder: Path) -> Path:
    """A checkpoint of one layer of 32 × 8 weights at 4 bits in one group."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    packed = {
        "model.up.qweight": torch.zeros(4, 8, dtype=torch.int32),
        "model.up.qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "model.up.scales": torch.zeros(1, 8, dtype=torch.float16),
        "model.up.g_idx": torch.zeros(32, dtype=torch.int32),
    }
    save_file({**packed, "model.norm.weight": torch.ones(10)}, folder / "model.safetensors")
    section = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq"}
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": section}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _describe(folder: Path) -> None:
    report = {"fidelity": asdict(FIDELITY), "layer_errors": {"model.up": 0.0123}}
    card = {
        "target": {"name": "demo", "fingerprint": "f"},
        "calibration": {"name": "self", "seed": 0},
        "versions": {},
        "report": report,
    }
    (folder / "quasar.json").write_text(json.dumps(card))


def test_inspect_shows_what_a_checkpoint_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _checkpoint(tmp_path / "v")
    _describe(folder)
    assert run(["inspect", str(folder)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for fact in ("LlamaForCausalLM", "4 bits, groups of 32, symmetric", "276 B packed, 40 B as they were", "0.9471"):
        assert fact in shown
    for fact in ("model.up 4 32 276 B 0.0123", "0.00 to 0.50 10 0.500", "0.50 to 2.00 20 0.950", "2.00 and more 0 –"):
        assert fact in shown


def test_inspect_json_by_the_name_of_a_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _checkpoint(tmp_path / "v")
    _describe(folder)
    store.record_pair("demo", folder)
    for arguments in (["inspect", "--json"], ["inspect", "v", "--json"]):
        assert run(arguments) == 0
        document = json.loads(capsys.readouterr().out)
        assert (document["checkpoint"], document["target"]) == (str(folder), "demo")
        assert document["bytes"] == {"packed": 276, "plain": 40}
        assert document["bits_per_weight"] == 276 * 8 / 256
        assert document["report"]["fidelity"]["agreement"] == 0.9471


def test_inspect_reads_a_checkpoint_of_another_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(_checkpoint(tmp_path / "v"))]) == 0
    assert "not measured: quasar did not write this checkpoint" in capsys.readouterr().out


def test_inspect_refuses_a_model_that_is_not_quantized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _checkpoint(tmp_path / "v")
    (folder / "config.json").write_text("{}")
    assert run(["inspect", str(folder)]) == 1
    assert "is not a quantized checkpoint" in capsys.readouterr().err


def test_doctor_says_what_this_machine_can_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _record(tmp_path)
    assert run(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings["packages"]["torch"]
    assert findings["memory_bytes"] > 1e8
    assert findings["read_bandwidth_bytes_per_s"] > 1e8
    assert findings["current_pair"]["target"] == "demo"
    usable = {kernel["name"]: kernel["usable"] for kernel in findings["kernels"]}
    assert usable["reference"]
    assert all(kernel["reason"] for kernel in findings["kernels"])
    assert run(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "demo-gptq-4bit-g128 (demo)" in shown
    assert "reference" in shown


def test_quick_reads_less_of_everything_and_what_is_asked_for_goes_before(stand_in_quantize: dict[str, Any]) -> None:
    def config(*options: str) -> tuple[int, int | None, int]:
        assert run(["quantize", "demo", *options]) == 0
        asked = stand_in_quantize["config"]
        return asked.samples, asked.seq_len, asked.fidelity_rows

    assert config() == (128, None, 32)
    assert config("--quick") == (16, 128, 8)
    assert config("--quick", "--samples", "40") == (40, 128, 8)
