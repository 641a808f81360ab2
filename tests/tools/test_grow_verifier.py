"""Grown verifiers: each layer's weight is the small one's at the places of the grown model's, and its function too."""

from pathlib import Path

import pytest
import torch
from helpers.decoder_cases import CPU, FLOAT, random_tokens, save_model
from helpers.quantized_decoder import quantize_layers

from quasar_core.checkpoint.gptq_format import QuantizedWeight, trivial_groups
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.errors import QuasarError, UsageError
from quasar_core.files import write_json
from quasar_core.models.config.shapes import SHAPES
from quasar_core.models.weights.lean_weights import attach_verifier, load_target
from quasar_core.store.fingerprint import fingerprint
from tools.demo.grow import grow
from tools.demo.grow_verifier import Places, grow_verifier, grown_layer

SMALL = {
    **SHAPES["qwen3-0.6b"],
    "hidden_size": 320,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "vocab_size": 128,
    "head_dim": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model and its verifier, and both grown."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "small").mkdir()
    save_model(folder / "small", "Qwen3", {"head_dim": 32, "tie_word_embeddings": True})
    quantize_layers(folder / "small", folder / "verifier", lambda name: 4 if "_proj" in name else 16)
    write_json(folder / "verifier" / "quasar.json", {"format_version": 1, "target": {"name": "x", "fingerprint": "y"}})
    grow(folder / "small", SMALL, folder / "grown", dtype=FLOAT)
    grow_verifier(folder / "verifier", folder / "grown", folder / "grown-verifier")
    return folder


def test_it_computes_the_small_verifiers_function(pairs: Path) -> None:
    logits = []
    for model, verifier in (("small", "verifier"), ("grown", "grown-verifier")):
        target = load_target(pairs / model, CPU, FLOAT)
        attached = attach_verifier(target, VerifierCheckpoint(pairs / verifier), "dense")
        for one in (target, attached):
            logits.append(one.forward(random_tokens(24), one.new_cache(24))[:, :96])
    target, verifier, grown_target, grown_verifier = logits
    torch.testing.assert_close(grown_verifier, verifier, atol=1e-4, rtol=0)
    assert (verifier - target).abs().max() > 0.01  # or it would tell nothing
    torch.testing.assert_close(grown_verifier - grown_target, verifier - target, atol=2e-4, rtol=0)


def test_it_belongs_to_the_grown_model(pairs: Path) -> None:
    checkpoint = VerifierCheckpoint(pairs / "grown-verifier")
    assert checkpoint.target_fingerprint == fingerprint(pairs / "grown")
    assert len(checkpoint.layer_names) == 7 * 6
    plain = TensorFiles(pairs / "grown")
    assert all(torch.equal(checkpoint.tensors.load(name), plain.load(name)) for name in checkpoint.plain_names)


def layer_of(codes: torch.Tensor, group: int) -> QuantizedWeight:
    groups = codes.shape[0] // group
    scales = torch.arange(1.0, groups * codes.shape[1] + 1).view(groups, -1).half()
    return QuantizedWeight(4, group, codes, scales, torch.full_like(scales, 8).int(), trivial_groups(len(codes), group))


def test_places_and_factors_by_hand() -> None:
    weight = layer_of(torch.tensor([[9, 7], [10, 6]], dtype=torch.uint8).repeat(4, 1), 4)
    places = Places(torch.tensor([1, -1, 0]), torch.tensor([4, 5, -1, -1]), torch.tensor([2.0, 1.0, 1.0]))
    found = grown_layer(weight, places).dequantize()
    assert found.tolist() == [[-8.0, -16.0, 0, 0], [0, 0, 0, 0], [3.0, 6.0, 0, 0]]


def test_a_group_with_two_scales_is_refused() -> None:
    weight = layer_of(torch.full((8, 2), 9, dtype=torch.uint8), 4)
    with pytest.raises(QuasarError, match="two of the verifier's groups would share one"):
        grown_layer(weight, Places(torch.tensor([0]), torch.tensor([3, 4, -1, -1]), torch.ones(1)))
    with pytest.raises(QuasarError, match="6 inputs are not a multiple"):
        grown_layer(weight, Places(torch.tensor([0]), torch.arange(6), torch.ones(1)))


def test_an_existing_folder_and_other_layers_are_refused(pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists"):
        grow_verifier(pairs / "verifier", pairs / "grown", tmp_path)
    quantize_layers(pairs / "small", tmp_path / "some", lambda name: 4 if "mlp" in name else 16)
    with pytest.raises(QuasarError, match="must have codes for all layers of its blocks"):
        grow_verifier(tmp_path / "some", pairs / "grown", tmp_path / "out")
    assert not (tmp_path / "out").exists()
