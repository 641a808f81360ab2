"""Helpers of the tests."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.quantize.solve.gptq import SolverConfig, solve

_LINEAR = re.compile(r"_proj\.weight$|\.experts\.\d+\.w\d\.weight$|\.shared_mlp\.\w+\.weight$|^lm_head\.weight$")


def quantize_layers(source: Path, output: Path, bits: Callable[[str], int]) -> VerifierCheckpoint:
    """Round the linear layers of a tiny model to groups of 32; 16 bits leaves one as it is."""
    output.mkdir()
    tensors = load_file(source / "model.safetensors")
    for name in filter(_LINEAR.search, list(tensors)):
        width = bits(name)
        if width < 16:
            weight = tensors.pop(name)
            config = SolverConfig(bits=width, group_size=32, sym=False, scale_search=False, sweeps=0)
            packed = solve(weight, torch.eye(weight.shape[1]), config).weight.pack()
            tensors |= {name.replace(".weight", f".{suffix}"): tensor for suffix, tensor in packed.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, output / "model.safetensors")
    section = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq"}
    config = json.loads((source / "config.json").read_text())
    (output / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    return VerifierCheckpoint(output)


def mixed_bits(name: str) -> int:
    """Layers that can be fused, layers of other widths, layers left in 16 bits, and a head of 8."""
    if name == "lm_head.weight":
        return 8
    if "layers.1." in name:
        return {"k_proj": 16, "v_proj": 8, "up_proj": 16, "w1": 8}.get(name.split(".")[-2], 4)
    if "layers.2." in name:
        return 16
    return 8 if "layers.3.self_attn.k_proj" in name else 4
