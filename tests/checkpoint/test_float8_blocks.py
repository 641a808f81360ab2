"""A model that is published in 8-bit blocks is read as the bfloat16 model that its codes and scales stand for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import CASES, CPU, FLOAT, in_passes, random_tokens, save_model
from helpers.float8_models import BLOCK, to_blocks
from helpers.multimodal_models import add_tensors, save_multimodal

from quasar_core.checkpoint.float8_blocks import dequantize
from quasar_core.checkpoint.tensor_files import TensorFiles
from quasar_core.errors import QuasarError
from quasar_core.models.loading import load_models


@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "one scale"])
@pytest.mark.parametrize("case", [("Llama", {"intermediate_size": 80}), CASES["qwen 3 moe"]], ids=["dense", "experts"])
def test_a_model_in_8_bit_blocks_is_the_model_that_they_stand_for(
    tmp_path: Path, whole: bool, case: tuple[str, dict[str, Any]]
) -> None:
    save_model(tmp_path / "plain", *case)
    meant = to_blocks(tmp_path / "plain", tmp_path / "blocks", whole)
    files = TensorFiles(tmp_path / "blocks")
    assert files.names() == TensorFiles(tmp_path / "plain").names()
    assert files.dequantized == len(meant)
    assert all(torch.equal(files.load(name), weight) for name, weight in meant.items())
    models = [load_models(tmp_path / name, None, CPU, FLOAT) for name in ("plain", "blocks")]
    logits = [in_passes(loaded.target, random_tokens(), [20, 1, 4]) for loaded in models]
    assert torch.equal(*logits)
    note = f"weights: {len(meant)} are stored in 8-bit floats with scales, and dequantized to bfloat16"
    assert [note in loaded.notes for loaded in models] == [False, True]


@pytest.mark.parametrize("name", ["qwen3.5", "gemma 3", "mistral small 3.1"])
def test_the_text_part_of_a_multimodal_folder_is_read_so_and_its_tower_too(tmp_path: Path, name: str) -> None:
    save_multimodal(tmp_path / "plain", name)
    add_tensors(tmp_path / "plain", {"mtp.layers.0.mlp.up_proj.weight": torch.randn(48, 64)})
    meant = to_blocks(tmp_path / "plain", tmp_path / "blocks", whole=False)
    files = TensorFiles(tmp_path / "blocks")
    plain = TensorFiles(tmp_path / "plain")
    assert (files.names(), files.beside) == (plain.names(), plain.beside)
    assert all(torch.equal(files.load(key), weight) for key, weight in meant.items())
    models = [load_models(tmp_path / kind, None, CPU, FLOAT) for kind in ("plain", "blocks")]
    assert torch.equal(*(in_passes(loaded.target, random_tokens(), [20, 1, 4]) for loaded in models))
    count = sum("language_model" in key or key.startswith("mtp.") for key in meant)
    note = f"weights: {count} are stored in 8-bit floats with scales, and dequantized to bfloat16"
    assert [note in loaded.notes for loaded in models] == [False, True]
    assert "decoder: our own" in models[1].notes


def test_scales_of_another_shape_are_refused() -> None:
    codes = torch.zeros(40, 40, dtype=torch.float8_e4m3fn)
    with pytest.raises(QuasarError, match=r"The tensor a.weight_scale_inv is \(2, 2\), and by its blocks \(2, 3\)"):
        dequantize("a.weight", codes, torch.ones(2, 2), BLOCK)
