"""Which files and tensors count, sizes that cannot be right, and tokens beyond the embedding: said before any work."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import SIZES, greedy, make, save_family
from helpers.quantize_cases import CONFIG
from safetensors.torch import load_file, save_file

from quasar_cli.main import run
from quasar_core.api import decoding, quantizing
from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.config import GenerationConfig
from quasar_core.decode.generator import Generator
from quasar_core.errors import QuasarError, reason
from quasar_core.models.context import UNLIMITED, context_limit
from quasar_core.models.pair import load_tokenizer
from quasar_core.models.weights.lean_weights import load_target
from quasar_core.store import resolve_model

pytest_plugins = ["helpers.quantize_fixtures"]
CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"


@pytest.fixture
def llama(tmp_path: Path, small_texts: None) -> Path:
    save_family(tmp_path / "m", lambda: make("Llama", **SIZES))
    return tmp_path / "m"


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_usual_file_counts_alone(llama: Path) -> None:
    """As in transformers: what lies beside it (another copy, an adapter) is no part of the model."""
    save_file({"model.norm.weight": torch.zeros(64), "stray": torch.ones(1)}, llama / "adapter.safetensors")
    files = TensorFiles(llama)
    assert "stray" not in files
    assert torch.equal(files.load("model.norm.weight"), torch.ones(64))
    expected = greedy(make_loaded(llama), [5, 6, 7], 8)
    pair = decoding.load_pair(str(llama), verify="full", device="cpu", dtype="float32")
    found = Generator(pair, GenerationConfig(8, "full", ignore_eos=True)).generate([5, 6, 7]).token_ids
    assert list(found) == expected


def make_loaded(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_a_name_in_two_files_is_refused(llama: Path) -> None:
    (llama / WEIGHTS).rename(llama / "a.safetensors")
    assert "model.norm.weight" in TensorFiles(llama)
    save_file({"model.norm.weight": torch.zeros(64)}, llama / "b.safetensors")
    sentence = r"The tensor model\.norm\.weight is in both a\.safetensors and b\.safetensors"
    for start in (TensorFiles, lambda folder: resolve_model(str(folder))):
        with pytest.raises(QuasarError, match=sentence):
            start(llama)


def test_a_name_twice_in_one_header_is_refused(tmp_path: Path) -> None:
    entry = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    header = f"{{{entry}, {entry}}}".encode()
    (tmp_path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(QuasarError, match="is not a"):
        TensorFiles(tmp_path)


def shrink_vocabulary(folder: Path) -> None:
    edit(folder, vocab_size=200)


def double_heads(folder: Path) -> None:
    edit(folder, num_attention_heads=4)


def widen(folder: Path) -> None:
    edit(folder, intermediate_size=96)


CONTRADICTIONS: dict[str, tuple[Callable[[Path], None], str]] = {
    "vocabulary": (
        shrink_vocabulary,
        r"model\.embed_tokens\.weight in .* is \(264, 64\), and by its config \(200, 64\)",
    ),
    "key-value heads": (lambda folder: edit(folder, num_key_value_heads=2), r"k_proj\.weight in .* is \(32, 64\)"),
    "inner size": (widen, r"gate_proj\.weight in .* is \(64, 64\), and by its config \(96, 64\)"),
}
ABSURD: dict[str, dict[str, int]] = {
    "layers": {"num_hidden_layers": 10**9},
    "vocabulary": {"vocab_size": 10**12},
    "hidden size": {"hidden_size": 10**10},
    "inner size": {"intermediate_size": 10**12},
    "head size": {"head_dim": 10**11},
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_config_that_contradicts_the_weights_is_refused_by_the_dry_run_too(name: str, llama: Path) -> None:
    change, sentence = CONTRADICTIONS[name]
    change(llama)
    for start in (quantizing.estimate, quantizing.quantize):
        with pytest.raises(QuasarError, match=sentence):
            start(str(llama), CONFIG, device="cpu")
    with pytest.raises(QuasarError, match=sentence):
        decoding.load_pair(str(llama), verify="full", device="cpu")
    assert not list(llama.parent.glob("m-*"))


@pytest.mark.parametrize("family", ["Llama", "Phi3"])
@pytest.mark.parametrize("name", ABSURD)
def test_absurd_sizes_are_told_by_the_headers(
    name: str, family: str, tmp_path: Path, small_texts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_family(tmp_path / "m", lambda: make(family, **SIZES, pad_token_id=0))
    edit(tmp_path / "m", **ABSURD[name])
    monkeypatch.setattr(torch.Tensor, "copy_", None)  # nothing may be filled
    for start in (
        lambda: decoding.load_pair(str(tmp_path / "m"), verify="full", device="cpu"),
        lambda: quantizing.estimate(str(tmp_path / "m"), CONFIG, device="cpu"),
    ):
        with pytest.raises(QuasarError, match=r"config\.json in .* has|and by its config|transformers"):
            start()


def test_a_token_beyond_the_embedding_is_named(llama: Path) -> None:
    pair = decoding.load_pair(str(llama), verify="full", device="cpu", dtype="float32")
    generator = Generator(pair, GenerationConfig(4, "full"))
    for token in (264, 10**9, -1):
        with pytest.raises(QuasarError, match=rf"The prompt has the token {token}.*the model's embedding has 264 rows"):
            generator.generate([5, token, 6])


@pytest.mark.parametrize(
    ("option", "config"),
    [
        ("n_positions", {"model_type": "gpt2"}),
        ("max_seq_len", {"model_type": "mpt"}),
        ("max_position_embeddings", {"model_type": "llama"}),
        ("max_sequence_length", {"model_type": "bloom"}),
        ("seq_length", {"model_type": "bloom"}),
    ],
)
def test_the_context_by_whatever_name(option: str, config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**config, option: 77}))
    assert context_limit(tmp_path) == 77


def test_a_context_that_no_option_names(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    assert context_limit(tmp_path) == UNLIMITED


def test_an_error_without_words_is_told_by_its_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reason(ValueError()) == "ValueError"
    assert reason(ValueError("\n a reason. \nmore")) == "a reason"

    def fail(*_: Any, **__: Any) -> None:
        raise OSError

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(QuasarError, match=r"could not be loaded: OSError\.$"):
        load_tokenizer(tmp_path)


@pytest.fixture
def verifier(llama: Path) -> Path:
    """A verifier's folder, written by quasar."""
    return Path(quantizing.quantize(str(llama), CONFIG, device="cpu").checkpoint)


LAYER = "model.layers.0.mlp.up_proj"
BROKEN: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = {
    "scales": ("scales", lambda t: t.double(), f"{LAYER} has scales in"),
    "zeros": ("qzeros", lambda t: t[:, :-1].contiguous(), f"{LAYER} has qzeros of shape"),
    "groups": ("g_idx", lambda t: t.float(), f"{LAYER} has g_idx in float32"),
    "outputs": ("scales", lambda t: t[:, :-8].contiguous(), f"{LAYER} has scales of shape"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_inspect_refuses_what_generate_refuses(name: str, verifier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part, change, sentence = BROKEN[name]
    tensors = load_file(verifier / WEIGHTS)
    tensors[f"{LAYER}.{part}"] = change(tensors[f"{LAYER}.{part}"])
    save_file(tensors, verifier / WEIGHTS)
    assert run(["inspect", str(verifier)]) == 1
    assert sentence in capsys.readouterr().err
    with pytest.raises(QuasarError, match=sentence):
        decoding.load_pair(str(verifier.parent / "m"), str(verifier), verify="exact", device="cpu")


def test_inspect_refuses_layers_of_another_models_size(verifier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(verifier, intermediate_size=128)
    assert run(["inspect", str(verifier)]) == 1
    assert "mlp.down_proj of" in capsys.readouterr().err


def as_version_2(folder: Path, **section: Any) -> None:
    """Zeros as version 2 stores them, one more, and other words in the section; None takes one out."""
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        if name.endswith("qzeros"):
            assert bool((tensor == 0x77777777).all())
            tensors[name] = torch.full_like(tensor, 0x88888888 - 2**32)
    save_file(tensors, folder / WEIGHTS)
    reword(folder, **section)


def reword(folder: Path, **section: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    words = {**config["quantization_config"], **section}
    edit(folder, quantization_config={key: value for key, value in words.items() if value is not None})


@pytest.mark.parametrize(
    ("section", "reading"),
    [
        ({}, "version 2, as all are 8, though its config names version 1"),
        ({"checkpoint_format": None}, "version 2, as all are 8, though its config names version 1"),
        ({"checkpoint_format": None, "format": "gptq_v2"}, "version 2, as its config names it"),
        ({"checkpoint_format": "gptq_v2", "format": "gptq_v2"}, "version 2, as its config names it"),
        (
            {"checkpoint_format": None, "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"},
            "version 2, as all are 8, though its config names version 1",
        ),
        ({"checkpoint_format": None, "format": "gptq_v2", "sym": False}, "version 2, as its config names it"),
    ],
)
def test_zeros_of_version_2_by_whatever_name(
    section: dict[str, Any], reading: str, verifier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(verifier.parent / "m")
    first: Any = decoding.load_pair(source, str(verifier), verify="exact", device="cpu", kernel="reference")
    cases = [5, 6, 7, 8]
    expected = first.verifier.forward(cases, first.verifier.new_cache(8))
    as_version_2(verifier, **section)
    (verifier / "quantize_config.json").unlink()
    pair: Any = decoding.load_pair(source, str(verifier), verify="exact", device="cpu", kernel="reference")
    assert f"zeros: {reading}" in pair.notes
    assert torch.equal(pair.verifier.forward(cases, pair.verifier.new_cache(8)), expected)
    capsys.readouterr()
    assert run(["inspect", str(verifier), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["zeros"] == reading


def test_two_names_that_contradict_each_other(verifier: Path) -> None:
    reword(verifier, format="gptq_v2")
    with pytest.raises(QuasarError, match="names two formats: gptq and gptq_v2"):
        decoding.load_pair(str(verifier.parent / "m"), str(verifier), verify="exact", device="cpu")


def test_the_lean_decoder_allocates_nothing_before_it_has_looked(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(llama, vocab_size=10**12)
    monkeypatch.setattr(
        "quasar_core.models.weights.filling.empty_in_huge_pages", lambda *_, **__: pytest.fail("allocated")
    )
    with pytest.raises(QuasarError, match="and by its config"):
        load_target(llama, CPU, torch.float32)
