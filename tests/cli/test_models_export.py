"""`quasar models export`: the same codes under GPTQModel's names, in a folder that appears whole; what it refuses."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import CASES, random_tokens, save_model
from helpers.default_share import some
from helpers.folders import contents
from helpers.quantize_cases import shorten_texts
from helpers.tiny_model import save_tiny_model
from safetensors.torch import load_file, save_file

from quasar_cli.main import run
from quasar_core.api import exporting, quantizing
from quasar_core.checkpoint import writer
from quasar_core.checkpoint.checks import KEY as DIGESTS
from quasar_core.checkpoint.checks import file_digest
from quasar_core.checkpoint.gptqmodel_names import NAMINGS
from quasar_core.checkpoint.loaders import Config
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.config import QuantizeConfig
from quasar_core.errors import QuasarError
from quasar_core.models.weights.lean_weights import load_verifier_alone

pytest_plugins = ["helpers.quantize_fixtures"]
pytestmark = pytest.mark.usefixtures("small_texts")
CPU = torch.device("cpu")
SHORT = QuantizeConfig(samples=2, seq_len=16)  # codes are compared, and what is measured of them is not asked for
USUAL = replace(SHORT, group_size=32, rounding="nearest")
FIRST = {family: case for case, (family, _) in reversed(CASES.items())} | {"Gemma4": "gemma 4, experts"}
IN_16_BITS = {"GraniteMoe", "GraniteMoeShared", "Lfm2Moe", "Gemma4"}


def verifier(place: Path, case: str, config: QuantizeConfig = USUAL) -> Path:
    """A family's quantized tiny model."""
    save_tiny_model(place / "tiny")
    name, options = CASES[case]
    save_model(place / "tiny", name, {**options, "vocab_size": 264})
    return Path(quantizing.quantize(str(place / "tiny"), config, device="cpu").checkpoint)


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("phi")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUASAR_HOME", str(place / "home"))
        shorten_texts(patch)
        return verifier(place, "phi 3")


@pytest.fixture
def phi(made_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made_once, tmp_path / "phi" / made_once.name))


def logits(folder: Path) -> torch.Tensor:
    model = load_verifier_alone(VerifierCheckpoint(folder), CPU, torch.float32, "reference")
    tokens = random_tokens(20)
    return model.forward(tokens, model.new_cache(len(tokens)))


def loaders(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    capsys.readouterr()
    assert run(["inspect", str(folder), "--verify", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "as they were written" in found["digest"]
    return dict(found["loaders"])


ONE_OF_A_KIND = [f"{family}ForCausalLM" for family in ("Phi3", "Mixtral", "GraniteMoe", "Lfm2Moe", "Gemma4")]


@pytest.mark.parametrize("architecture", some(NAMINGS, ONE_OF_A_KIND))
def test_an_exported_family_is_the_same_verifier(
    architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Codes to the last bit; weights in 16 bits to float16's rounding."""
    family, naming = architecture.removesuffix("ForCausalLM"), NAMINGS[architecture]
    source = verifier(tmp_path, FIRST[family])
    before = contents(source)
    says = loaders(source, capsys)
    assert says["GPTQModel"].startswith("no: ")
    assert says["GPTQModel"].endswith("; `quasar models export` writes what it loads")
    assert run(["models", "export", str(source)]) == 0
    assert contents(source) == before
    made = source.with_name(f"{source.name}-for-gptqmodel")
    says = loaders(made, capsys)
    assert says["GPTQModel"] == "yes"
    assert (family in IN_16_BITS) == (naming.in_16_bits is not None)
    if naming.in_16_bits:
        assert {says[name] for name in says if name != "GPTQModel"} == {
            "no: its experts have no codes, and the names that GPTQModel looks for"
        }
        torch.testing.assert_close(logits(made), logits(source), rtol=0, atol=2e-3 * float(logits(source).abs().max()))
    else:
        assert torch.equal(logits(made), logits(source))
    stored = load_file(made / "model.safetensors")
    for layer in VerifierCheckpoint(source).file_layers:
        for part in naming.parts(layer):
            assert naming.keeps(layer) or f"{part}.qweight" in stored
    assert not any(name.endswith(".gate_up_proj.qweight") for name in stored)


def test_nothing_else_is_lost(phi: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (phi / "chat_template.jinja").write_text("{{ messages }}")
    (phi / "LICENSE").write_text("free")
    (phi / "additional_chat_templates").mkdir()
    (phi / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    made = phi.parent / "made"
    assert run(["models", "export", str(phi), "--for", "gptqmodel", "--output", str(made), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["checkpoint"] == str(made)
    assert (document["layers"], document["in_16_bits"], document["for"]) == (20, 0, "gptqmodel")
    old, new = contents(phi), contents(made)
    assert old.keys() == new.keys()
    changed = {name for name in old if old[name] != new[name]}
    assert changed == {"README.md", "config.json", "model.safetensors", "quantize_config.json", "quasar.json"}
    assert new["README.md"].startswith(old["README.md"].rstrip())
    assert b"GPTQModel looks for codes" in new["README.md"]
    configs = [json.loads(files["config.json"]) for files in (old, new)]
    sections = [config.pop("quantization_config") for config in configs]
    assert configs[0] == configs[1]
    assert json.loads(new["quantize_config.json"]) == sections[1]
    assert sections[1]["meta"].pop("exported_for") == "gptqmodel"
    listed = sections[1].pop("modules_in_block_to_quantize")
    assert {"model.layers.0.mlp.gate_proj", "model.layers.0.mlp.gate_up_proj"} <= {
        name for [*names] in listed for name in names
    }
    sections[0].pop("modules_in_block_to_quantize")
    assert sections[0] == sections[1]
    card = json.loads(new["quasar.json"])
    assert card["sha256"] == {"model.safetensors": file_digest(made / "model.safetensors")}
    assert "run" not in card
    assert card["target"] == json.loads(old["quasar.json"])["target"]


def test_shards_are_kept_small(phi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer.ShardWriter.__init__, "__defaults__", (60_000,))
    made = Path(exporting.export(str(phi))["checkpoint"])
    index = json.loads((made / "model.safetensors.index.json").read_text())["weight_map"]
    shards = sorted(path.name for path in made.glob("*.safetensors"))
    assert len(shards) > 2
    assert set(index.values()) == set(shards) == json.loads((made / "quasar.json").read_text())["sha256"].keys()
    assert torch.equal(logits(made), logits(phi))


def test_widths_by_layer_are_told_by_the_new_names(tmp_path: Path) -> None:
    """Of layers with 8 bits among others with 4: the rules under the old names are gone."""
    source = verifier(
        tmp_path, "phi 3", QuantizeConfig(group_size=32, mean_bits=5.5, widths=(4, 8), samples=6, seq_len=24)
    )
    checkpoint = VerifierCheckpoint(source)
    made = VerifierCheckpoint(Path(exporting.export(str(source))["checkpoint"]))
    naming, told = NAMINGS["Phi3ForCausalLM"], Config.of(made.config["quantization_config"])
    widths = {name: checkpoint.layer(name).bits for name in checkpoint.layer_names}
    wide = {name for name, bits in widths.items() if bits != told.bits}
    assert any(name.endswith("gate_up_proj") for name in wide)
    for name, bits in widths.items():
        assert all((told.width(part) or (0, 0))[0] == bits for part in naming.parts(name)), name
    assert torch.equal(logits(made.folder), logits(source))


def test_a_checkpoint_of_another_tool(phi: Path) -> None:
    """Without card and digests, its section in the second file alone; a rule of what has no codes stays."""
    config = json.loads((phi / "config.json").read_text())
    section = config.pop("quantization_config") | {"dynamic": {r"-:.*\.vision\..*": {}}, "meta": "somebody's"}
    (phi / "config.json").write_text(json.dumps(config))
    (phi / "quantize_config.json").write_text(json.dumps(section))
    for name in ("quasar.json", "README.md"):
        (phi / name).unlink()
    made = Path(exporting.export(str(phi))["checkpoint"])
    assert json.loads((made / "quantize_config.json").read_text())["dynamic"] == {r"-:.*\.vision\..*": {}}
    assert torch.equal(logits(made), logits(phi))
    assert Path(exporting.export(str(phi), force=True)["checkpoint"]) == made  # it is known as quasar's own


def test_an_output_that_exists(phi: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = phi.parent / "made"
    command = ["models", "export", str(phi), "-o", str(made)]
    assert run(command) == 0
    first = contents(made)
    (made / "notes").write_text("mine")
    assert run(command) == 2
    assert "exists; pass --force to replace it, or --output for another place." in capsys.readouterr().err
    assert run([*command, "--force"]) == 0
    assert contents(made) == first
    assert (phi.parent / "made.replaced-by-quasar" / "notes").exists()
    (phi.parent / "other").mkdir()
    (phi.parent / "other" / "file").write_text("mine")
    assert run(["models", "export", str(phi), "-o", str(phi.parent / "other"), "--force"]) == 2
    assert "no verifier that quasar wrote" in capsys.readouterr().err
    assert run(["models", "export", str(phi), "-o", str(phi / "inside")]) == 2
    assert "lies in the model" in capsys.readouterr().err


def test_an_interrupted_export_leaves_no_output_and_is_begun_anew(phi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = phi.with_name(f"{phi.name}-for-gptqmodel")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(exporting, "_card", interrupted)
        with pytest.raises(KeyboardInterrupt):
            exporting.export(str(phi))
    assert not made.exists()
    assert (phi.parent / f"{made.name}.partial").exists()
    exporting.export(str(phi))
    assert made.exists()
    assert not (phi.parent / f"{made.name}.partial").exists()


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("call", ["rename", "unlink"])
def test_an_end_that_is_interrupted_is_finished_by_the_next(
    phi: Path, call: str, forced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the work gets its name, and behind that."""
    made = phi.with_name(f"{phi.name}-for-gptqmodel")
    if forced:
        exporting.export(str(phi))
    whole, real = getattr(Path, call), {"rename": ".partial", "unlink": "lock"}[call]

    def interrupted(path: Path, *rest: Any, **named: Any) -> Any:
        if path.name.endswith(real):
            raise KeyboardInterrupt
        return whole(path, *rest, **named)

    with monkeypatch.context() as patched:
        patched.setattr(Path, call, interrupted)
        with pytest.raises(KeyboardInterrupt):
            exporting.export(str(phi), force=forced)
    exporting.export(str(phi), force=forced or made.exists())
    assert torch.equal(logits(made), logits(phi))
    assert sorted(path.name for path in made.parent.iterdir() if path.name.startswith(made.name)) == [made.name]
    assert not (made / "lock").exists()


def test_a_damaged_verifier_is_not_copied(phi: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither one whose bytes have changed, nor one of another tool whose scales are no numbers."""
    weights = next(phi.glob("*.safetensors"))
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("scales"))
    save_file({**tensors, name: tensors[name].fill_(torch.nan)}, weights)
    assert run(["models", "export", str(phi)]) == 1
    assert "is damaged or was changed" in capsys.readouterr().err
    card = json.loads((phi / "quasar.json").read_text())
    (phi / "quasar.json").write_text(json.dumps({key: value for key, value in card.items() if key != DIGESTS}))
    assert run(["models", "export", str(phi)]) == 1
    assert name.removesuffix(".scales") in capsys.readouterr().err
    assert not phi.with_name(f"{phi.name}-for-gptqmodel").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_cannot_be_copied_is_told_before_anything_is_written(
    phi: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (phi / "more").mkdir()
    os.mkfifo(phi / "more" / "pipe")
    assert run(["models", "export", str(phi)]) == 1
    assert capsys.readouterr().err == f"Error: {phi / 'more' / 'pipe'} is a pipe, not a file.\n"
    (phi / "more" / "pipe").unlink()
    (phi / "README.md").write_bytes(b"\xff\xfe\xff")
    assert run(["models", "export", str(phi)]) == 1
    assert "README.md" in capsys.readouterr().err
    assert [path.name for path in phi.parent.iterdir() if "gptqmodel" in path.name] == []


def test_a_layer_that_has_no_codes_is_cut_too(phi: Path) -> None:
    """As GPTQModel has gate and up apart, whoever left them in 16 bits."""
    weights = next(phi.glob("*.safetensors"))
    tensors, layer = load_file(weights), "model.layers.0.mlp.gate_up_proj"
    outputs = tensors[f"{layer}.scales"].shape[1]
    inputs = len(tensors[f"{layer}.g_idx"])
    for kind in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{layer}.{kind}"]
    tensors[f"{layer}.weight"] = torch.randn(outputs, inputs).half()
    save_file(tensors, weights)
    (phi / "quasar.json").unlink()
    made = load_file(next(Path(exporting.export(str(phi))["checkpoint"]).glob("*.safetensors")))
    halves = [made[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(torch.cat(halves), tensors[f"{layer}.weight"])


def test_work_of_others_is_left_alone(phi: Path, capsys: pytest.CaptureFixture[str]) -> None:
    partial = phi.with_name(f"{phi.name}-for-gptqmodel.partial")
    (partial / "commits").mkdir(parents=True)
    (partial / "lock").touch()
    assert run(["models", "export", str(phi)]) == 2
    assert "holds what `quasar quantize` has finished" in capsys.readouterr().err
    (partial / "commits").rmdir()
    import fcntl

    with (partial / "lock").open("a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        os.pwrite(held.fileno(), b"123\n", 0)
        assert run(["models", "export", str(phi)]) == 2
    assert "Another run (process 123) writes" in capsys.readouterr().err
    assert partial.exists()


def test_a_full_disk_is_told_before_anything_is_written(phi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "free_disk", lambda output: 1000)
    with pytest.raises(QuasarError, match=r"^This needs 0\.\d MB of disk, and 0\.0 MB are free here"):
        exporting.export(str(phi))
    assert not list(phi.parent.glob("*gptqmodel*"))


@pytest.mark.parametrize(
    ("case", "config", "sentence"),
    [
        ("llama", USUAL, "GPTQModel loads .* as it is: there is nothing to export."),
        ("granite 4", USUAL, "does not load .* under other names either: it fails on Mamba's layers"),
        ("glm 4 moe", USUAL, "does not load .* under other names either: its pass of this architecture fails"),
        ("phi 3", replace(SHORT, method="fp8", bits=8, group_size=-1, rounding="nearest"), "has no codes of GPTQ"),
    ],
)
def test_what_need_not_or_cannot_be_exported(case: str, config: QuantizeConfig, sentence: str, tmp_path: Path) -> None:
    source = verifier(tmp_path, case, config)
    with pytest.raises(QuasarError, match=sentence):
        exporting.export(str(source))
    assert not list(tmp_path.glob("*for-gptqmodel*"))


def test_parts_that_fill_no_words_are_refused_in_one_sentence(phi: Path) -> None:
    """Gate and up of 20 outputs in all: each would have 10, and a word holds eight codes."""
    tensors = load_file(phi / "model.safetensors")
    name = "model.layers.1.mlp.gate_up_proj"
    cut = {"qweight": 24, "scales": 24, "qzeros": 3}
    for part, columns in cut.items():
        tensors[f"{name}.{part}"] = tensors[f"{name}.{part}"][:, :columns].contiguous()
    save_file(tensors, phi / "model.safetensors")
    with pytest.raises(QuasarError, match=rf"^{name} cannot be cut into the layers that GPTQModel has: 12 outputs"):
        exporting.export(str(phi))


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("model.layers.1.mlp.down_proj", "model.layers.1.mlp.down_proj.weight"),
        ("model.layers.1", "model.layers.1.self_attn.qkv_proj.weight"),
        ("model.norm", "model.norm.weight"),
    ],
)
def test_a_verifier_that_lacks_a_layer_is_refused_before_anything_is_written(
    lost: str, named: str, phi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {name: part for name, part in load_file(phi / "model.safetensors").items() if not name.startswith(lost)}
    save_file(kept, phi / "model.safetensors")
    monkeypatch.setattr(exporting, "begin_work", pytest.fail)
    with pytest.raises(QuasarError, match=rf"is not whole: its config promises {re.escape(named)}, and its files"):
        exporting.export(str(phi))


def test_parts_of_different_widths_are_no_verifier(phi: Path) -> None:
    made = Path(exporting.export(str(phi))["checkpoint"])
    tensors = load_file(made / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    scales, zeros = tensors[f"{name}.scales"], tensors[f"{name}.qzeros"]
    tensors |= {f"{name}.scales": scales[:1].clone(), f"{name}.qzeros": zeros[:1].clone()}
    tensors[f"{name}.g_idx"] = torch.zeros_like(tensors[f"{name}.g_idx"])
    save_file(tensors, made / "model.safetensors")
    with pytest.raises(QuasarError, match=r"gate_proj and .*up_proj are one layer of the model, and they differ"):
        logits(made)
