"""AWQ checkpoints as AutoAWQ writes them, made by plain loops: codes in its order, factors in the norms before."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GROUP = 32
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
BEHIND = {  # layers by the norm whose factors they take up
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
OTHERS = ("self_attn.o_proj", "mlp.down_proj")


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes [n, m] → words [n, m/8]."""
    words = torch.zeros(len(codes), codes.shape[1] // 8, dtype=torch.int64)
    for word in range(words.shape[1]):
        for place, column in enumerate(ORDER):
            words[:, word] += codes[:, word * 8 + column].long() << (4 * place)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def quantize_layer(weight: torch.Tensor, group: int = GROUP) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The stored tensors of a weight [out, in] rounded to nearest with zeros, and the weight that they stand for."""
    rows = weight.float().t().reshape(-1, group, weight.shape[0])  # [G, g, out]
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=1e-4).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes = (rows / scales.float()[:, None] + zeros[:, None]).round().clamp(0, 15)
    stands_for = ((codes - zeros[:, None]) * scales.float()[:, None]).reshape(-1, weight.shape[0]).t()
    stored = {"qweight": pack(codes.reshape(-1, weight.shape[0])), "qzeros": pack(zeros), "scales": scales}
    return stored, stands_for


def write_awq(source: Path, folder: Path, values_scaled: bool = False) -> dict[str, torch.Tensor]:
    """The AWQ checkpoint of a model; returns the plain weights that it stands for, by name.

    With `values_scaled`, values are divided by factors that the output projection takes up, as AWQ does without groups
    of queries.
    """
    shutil.copytree(source, folder)
    weights = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    plain = dict(weights)
    for norm in [name for name in weights if name.endswith("layernorm.weight")]:
        block, _, kind = norm.removesuffix(".weight").rpartition(".")
        factors = torch.rand(len(weights[norm]), generator=generator) * 2 + 0.5
        plain[norm] = (weights[norm].float() / factors).to(weights[norm].dtype)
        for layer in BEHIND[kind]:
            name = f"{block}.{layer}.weight"
            plain[name] = weights[name].float() * factors
    if values_scaled:
        for name in [name for name in plain if name.endswith("v_proj.weight")]:
            plain[name] = plain[name] / (torch.rand(len(plain[name]), 1, generator=generator) * 4 + 0.2)
    stored = {name: tensor for name, tensor in plain.items() if not _is_quantized(name)}
    for name in filter(_is_quantized, weights):
        parts, plain[name] = quantize_layer(plain[name])
        stored |= {f"{name.removesuffix('.weight')}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    section = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    change_config(folder, lambda config: config.update(quantization_config=section))
    return plain


def change_config(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def _is_quantized(name: str) -> bool:
    return any(
        name.endswith(f"{layer}.weight") for layer in (*BEHIND["input_layernorm"], *OTHERS, "gate_proj", "up_proj")
    )
