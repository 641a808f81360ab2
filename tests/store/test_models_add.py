"""Verifiers that somebody else made: taken where they belong to the target, refused with a reason where they do not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hub_server import HubServer, use_hub
from helpers.quantize_cases import quantize, save_model
from safetensors.torch import load_file, save_file

from quasar_cli.main import run
from quasar_core import store
from quasar_core.api import decoding, quantizing
from quasar_core.config import QuantizeConfig
from quasar_core.errors import QuasarError, UsageError
from quasar_core.quantize import calibration


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its GPTQ verifier and its W8A8 verifier, and another model of the same shape."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "HELD_OUT_ROWS", 3)
        patch.setattr(calibration, "GREEDY_LENGTH", 40)
        patch.setenv("QUASAR_HOME", str(folder / "home"))
        source = save_model(folder / "tiny", tied=False)
        quantize(source, output=folder / "gptq")
        eight = QuantizeConfig(bits=8, group_size=-1, method="w8a8", samples=4, seq_len=24)
        quantize(source, eight, output=folder / "w8a8")
    save_model(folder / "other", tied=False)
    weights = load_file(folder / "other" / "model.safetensors")
    torch.manual_seed(7)
    noise = {name: (tensor + 0.2 * torch.randn(tensor.shape)).to(tensor.dtype) for name, tensor in weights.items()}
    save_file(noise, folder / "other" / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of these, and a home without pairs."""
    for name in ("tiny", "gptq", "w8a8", "other"):
        shutil.copytree(made / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def without_card(folder: Path) -> Path:
    """As another tool leaves it."""
    (folder / "quasar.json").unlink()
    return folder


def test_a_verifier_that_lacks_a_layer_is_refused(place: Path) -> None:
    """Decoding would take the layer from the target, and only the verifier alone would miss it."""
    weights = load_file(place / "gptq" / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.1.self_attn.q_proj" not in name}
    save_file(kept, place / "gptq" / "model.safetensors", metadata={"format": "pt"})
    promised = r"gptq is not whole: its config promises model\.layers\.1\.self_attn\.q_proj"
    with pytest.raises(QuasarError, match=promised):
        quantizing.add_verifier(str(place / "gptq"), str(place / "tiny"))
    assert not store.list_pairs()


@pytest.mark.parametrize("kind", ["gptq", "w8a8"])
def test_a_verifier_with_a_scale_that_is_no_number_is_refused(place: Path, kind: str) -> None:
    weights = load_file(place / kind / "model.safetensors")
    name = next(name for name in sorted(weights) if name.endswith(("q_proj.scales", "q_proj.weight_scale")))
    weights[name][0] = float("nan")
    save_file(weights, place / kind / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuasarError, match=rf"The tensor {name} in .* holds values that are not finite"):
        quantizing.add_verifier(str(place / kind), str(place / "tiny"))
    assert not store.list_pairs()


def test_a_verifier_whose_card_names_a_model_beside_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    record = quantizing.add_verifier(str(place / "gptq"))
    assert record == store.PairRecord("gptq", str(place / "tiny"), str(place / "gptq"), added=True)
    assert store.current_pair() == record


@pytest.mark.parametrize("name", ["gptq", "w8a8"])
def test_a_verifier_of_another_tool_is_taken_for_a_target_that_is_named(
    place: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = without_card(place / name)
    assert run(["models", "add", str(folder)]) == 2
    assert "does not say which model it was made from: name it with --target MODEL." in capsys.readouterr().err
    assert run(["models", "add", f"{folder}/", "--target", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "name": name,
        "target": str(place / "tiny"),
        "verifier": str(folder),
        "added": True,
    }
    pair = decoding.load_pair(verify="exact", device="cpu")
    assert pair.verifier_name == name
    assert run(["models", "remove", name, "--yes"]) == 0
    assert "stays: it was added, not made here" in capsys.readouterr().err
    assert (folder / "model.safetensors").is_file()
    assert store.list_pairs() == []


def _another_vocabulary(place: Path) -> None:
    weights = load_file(place / "gptq" / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:200]
    save_file(weights, place / "gptq" / "model.safetensors", metadata={"format": "pt"})
    without_card(place / "gptq")


def _another_embedding(place: Path) -> None:
    weights = load_file(place / "gptq" / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].roll(1, 0)
    save_file(weights, place / "gptq" / "model.safetensors", metadata={"format": "pt"})
    without_card(place / "gptq")


def _other_codes(place: Path) -> None:
    weights = load_file(place / "gptq" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.qweight"
    weights[name] = torch.randint(-(2**31), 2**31, weights[name].shape, dtype=torch.int64).to(torch.int32)
    save_file(weights, place / "gptq" / "model.safetensors", metadata={"format": "pt"})
    without_card(place / "gptq")


def _a_narrower_target(place: Path) -> None:
    weights = load_file(place / "tiny" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = weights[name][:, :32].contiguous()
    save_file(weights, place / "tiny" / "model.safetensors", metadata={"format": "pt"})
    without_card(place / "gptq")


def _a_shallower_target(place: Path) -> None:
    weights = load_file(place / "tiny" / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".layers.1." not in name}
    save_file(kept, place / "tiny" / "model.safetensors", metadata={"format": "pt"})
    without_card(place / "gptq")


def _another_model(place: Path) -> None:
    shutil.rmtree(place / "tiny")
    (place / "other").rename(place / "tiny")


def _another_model_and_no_card(place: Path) -> None:
    _another_model(place)
    without_card(place / "gptq")


def _unreadable_format(place: Path) -> None:
    config = json.loads((place / "gptq" / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "bitsandbytes"
    (place / "gptq" / "config.json").write_text(json.dumps(config))


def _no_quantization(place: Path) -> None:
    shutil.rmtree(place / "gptq")
    shutil.copytree(place / "tiny", place / "gptq")


def _a_quantized_target(place: Path) -> None:
    shutil.rmtree(place / "tiny")
    shutil.copytree(place / "gptq", place / "tiny")


REFUSALS: dict[str, tuple[Callable[[Path], None], str]] = {
    "vocabulary": (_another_vocabulary, "their model.embed_tokens.weight, which was not quantized, differ"),
    "embedding": (_another_embedding, "their model.embed_tokens.weight, which was not quantized, differ"),
    "codes": (_other_codes, r"the codes of model.layers.0.mlp.down_proj do not stand for the weights there \(cosine"),
    "width": (_a_narrower_target, "down_proj has 64 inputs and 64 outputs, and 32 and 64 in that model"),
    "depth": (_a_shallower_target, r"that model has no layer model.layers.1\."),
    "fingerprint": (_another_model, "was not made from .*: their fingerprints differ"),
    "weights": (_another_model_and_no_card, "was not made from .*, which was not quantized, differ"),
    "format": (_unreadable_format, "is quantized by bitsandbytes, which this version does not read"),
    "none": (_no_quantization, "is not a quantized checkpoint"),
    "target": (_a_quantized_target, "is quantized itself; name the model that"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_belong_is_refused_with_a_reason(place: Path, name: str) -> None:
    change, words = REFUSALS[name]
    change(place)
    with pytest.raises(QuasarError, match=words):
        quantizing.add_verifier(str(place / "gptq"), str(place / "tiny"))
    assert store.list_pairs() == []


def test_a_card_that_names_a_model_that_is_not_here(place: Path) -> None:
    (place / "tiny").rename(place / "moved")
    with pytest.raises(UsageError, match="was made from tiny, which is not found under that name: give it with --targ"):
        quantizing.add_verifier(str(place / "gptq"))
    assert quantizing.add_verifier(str(place / "gptq"), str(place / "moved")).target == str(place / "moved")


def test_a_verifier_from_the_hub(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer(models={"org/tiny-4bit": place / "gptq"}) as hub:
        use_hub(monkeypatch, hub, place / "cache")
        record = quantizing.add_verifier("org/tiny-4bit", str(place / "tiny"))
        assert record.name == "tiny-4bit"
        assert Path(record.verifier).is_relative_to(place / "cache")
        with pytest.raises(QuasarError, match="was added and not made here, so it is not deleted"):
            store.remove_pair(record.name, delete_files=True)
        with pytest.raises(QuasarError, match="The hub has no org/nothing"):
            quantizing.add_verifier("org/nothing", str(place / "tiny"))


def test_a_verifier_that_was_made_here_stays_one(place: Path) -> None:
    store.record_pair(str(place / "tiny"), place / "gptq")
    record: Any = quantizing.add_verifier(str(place / "gptq"))
    assert not record.added
