"""A model that is published in 8-bit blocks is read as the bfloat16 model that its codes and scales stand for."""

import json
from pathlib import Path

import pytest
import torch
from helpers.decoder_cases import CPU, FLOAT, in_passes, random_tokens, save_model
from safetensors.torch import load_file, save_file

from quasar_core.checkpoint.float8_blocks import dequantize
from quasar_core.checkpoint.reader import TensorFiles
from quasar_core.errors import QuasarError
from quasar_core.models.loading import load_models

BLOCK = (32, 16)


def to_blocks(folder: Path, output: Path, whole: bool) -> dict[str, torch.Tensor]:
    """Write a model with its projections in 8-bit blocks, or with one scale each; what they stand for."""
    output.mkdir()
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name]
        rows, columns = (-(-size // part) for size, part in zip(weight.shape, BLOCK, strict=True))
        scales = torch.rand(1 if whole else rows, 1 if whole else columns) + 0.5
        scales = scales[0, 0] if whole else scales
        tensors[name] = codes = weight.to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales.bfloat16()
        if whole:
            tensors[name.replace("weight", "activation_scale")] = torch.ones(())
        spread = scales.bfloat16().float()
        if not whole:
            spread = spread.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
            spread = spread[: weight.shape[0], : weight.shape[1]]
        meant[name] = (codes.float() * spread).bfloat16()
    save_file(tensors, output / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    section = {"quant_method": "fp8", "weight_block_size": None if whole else list(BLOCK)}
    (output / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    plain = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if name not in meant}
    save_file({**plain, **meant}, folder / "model.safetensors")
    return meant


@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "one scale"])
def test_a_model_in_8_bit_blocks_is_the_model_that_they_stand_for(tmp_path: Path, whole: bool) -> None:
    save_model(tmp_path / "plain", "Llama", {"intermediate_size": 80})
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


def test_scales_of_another_shape_are_refused() -> None:
    codes = torch.zeros(40, 40, dtype=torch.float8_e4m3fn)
    with pytest.raises(QuasarError, match=r"The tensor a.weight_scale_inv is \(2, 2\), and by its blocks \(2, 3\)"):
        dequantize("a.weight", codes, torch.ones(2, 2), BLOCK)
