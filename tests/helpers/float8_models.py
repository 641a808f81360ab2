"""A tiny model whose projections are stored in 8-bit floats with scales."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

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
