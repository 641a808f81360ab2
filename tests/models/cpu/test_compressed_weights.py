"""Decoders whose weights are compressed: the same logits to the bit, fewer bytes, and said."""

from pathlib import Path

import pytest
import torch
from helpers.decoder_cases import CASES, CPU, FLOAT, in_passes, random_tokens, save_model
from helpers.quantized_decoder import quantize_layers

from quasar_core.bench.steps import lean_candidate
from quasar_core.models.cpu import compressed_weights
from quasar_core.models.cpu.compressed_weights import compress, saved_bytes
from quasar_core.models.decoder.layer import CompressedLinear, DenseLinear
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.loading import attach, load_models
from quasar_core.models.weights.lean_weights import attach_verifier, load_target

HALF = torch.bfloat16
pytestmark = [pytest.mark.usefixtures("cpp_pass")]


def loaded(folder: Path, case: str, dtype: torch.dtype = HALF) -> LeanDecoder:
    if not (folder / "config.json").exists():
        save_model(folder, *CASES[case])
    return load_target(folder, CPU, dtype)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(
    "case", ["llama, all biases", "llama, tied", "gemma 3", "muse glimmer", "qwen 3 moe", "granite 4, experts"]
)
def test_logits_are_those_of_the_weights_as_they_were(tmp_path: Path, case: str) -> None:
    whole, compressed = loaded(tmp_path, case), loaded(tmp_path, case)
    assert compress([compressed], wanted=True)
    attach(whole), attach(compressed)
    for passes in ([45], [20, 1, 4, 8, 12], [1] * 8 + [7, 9, 16, 5]):
        logits = in_passes(compressed, random_tokens(sum(passes)), passes)
        assert torch.equal(logits, in_passes(whole, random_tokens(sum(passes)), passes))
    for count in (20, 64):  # short, and long
        prompts = (
            decoder.pass_prompt(random_tokens(count), decoder.new_cache(64), 40) for decoder in (whole, compressed)
        )
        assert torch.equal(*prompts)
    assert whole.fast.longest_prompt == compressed.fast.longest_prompt  # type: ignore[union-attr]


def test_what_a_verifier_shares_is_compressed_once(tmp_path: Path) -> None:
    save_model(tmp_path / "target", *CASES["llama"])
    checkpoint = quantize_layers(
        tmp_path / "target", tmp_path / "verifier", lambda name: 16 if "mlp" in name or "head" in name else 4
    )
    target = load_target(tmp_path / "target", CPU, HALF)
    verifier = attach_verifier(target, checkpoint, "vnni")
    compress([target, verifier], wanted=True)
    for own, shared in zip(target.layers, verifier.layers, strict=True):
        assert isinstance(own.down, CompressedLinear)
        assert isinstance(shared.down, CompressedLinear)
        assert own.down.weight is shared.down.weight
        assert isinstance(own.qkv, CompressedLinear)
        assert not isinstance(shared.qkv, CompressedLinear | DenseLinear)


def test_the_bytes_of_a_pass_are_those_that_it_reads(tmp_path: Path) -> None:
    whole, compressed = loaded(tmp_path, "llama"), loaded(tmp_path, "llama")
    note = compress([compressed], wanted=True)
    fewer = lean_candidate(whole).weight_bytes - lean_candidate(compressed).weight_bytes
    assert fewer == saved_bytes(compressed) > 0 == saved_bytes(whole)
    assert note is not None
    assert note.startswith("weights: bfloat16 in 12 bits each, without loss; a pass reads 0 MB of 0")


@pytest.mark.parametrize("wanted", [True, None, False])
def test_other_weights_stay_and_it_is_said_where_it_was_asked(tmp_path: Path, wanted: bool | None) -> None:
    decoder = loaded(tmp_path, "llama", FLOAT)
    reason = "weights: as they are, since only bfloat16 is compressed, and these are float32"
    assert compress([decoder], wanted) == (reason if wanted else None)
    assert isinstance(decoder.head, DenseLinear)


def test_small_models_stay_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed_weights.cpp, "multiplies_bfloat16", lambda: True)  # on every processor
    monkeypatch.setattr(compressed_weights.cpp, "multiplies_in_tiles", lambda: False)
    assert compress([loaded(tmp_path, "llama")], wanted=None) is None
    monkeypatch.setattr(compressed_weights, "SMALLEST", 1)
    assert compress([loaded(tmp_path, "llama")], wanted=None)
    assert compress([loaded(tmp_path, "llama")], wanted=False) is None
    monkeypatch.setattr(compressed_weights.cpp, "multiplies_in_tiles", lambda: True)
    assert compress([loaded(tmp_path, "llama")], wanted=None) is None  # prompts take longer there
    assert compress([loaded(tmp_path, "llama")], wanted=True)


def test_loading_compresses_where_it_is_asked(tmp_path: Path) -> None:
    save_model(tmp_path, *CASES["llama"])
    notes = load_models(tmp_path, None, CPU, HALF, compress=True).notes
    assert sum(note.startswith("weights: bfloat16 in 12 bits") for note in notes) == 1
    assert not any(note.startswith("weights") for note in load_models(tmp_path, None, CPU, HALF).notes)


def test_what_transformers_runs_stays_and_it_is_said() -> None:
    assert compress([], wanted=True) == "weights: as they are, since transformers runs the model"
    assert compress([], wanted=None) is None
