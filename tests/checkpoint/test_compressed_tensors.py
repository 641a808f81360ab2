"""The compressed-tensors format: what is written, what is read, and what is refused in one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.packed_weights import make_weight
from safetensors.torch import save_file

from quasar_core.checkpoint.compressed_tensors import (
    FLOAT8,
    FORMATS,
    Float8Weight,
    quantization_section,
    stored_tensors,
)
from quasar_core.checkpoint.gptq_format import QuantizedWeight, pack_columns, pack_rows
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.errors import QuasarError
from quasar_core.quantize.solve.eight_bit import E4M3Format, Int8Format


def write(folder: Path, section: dict[str, Any], tensors: dict[str, torch.Tensor]) -> VerifierCheckpoint:
    """One quantized layer `a.b` and a norm."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": section}))
    stored = {f"a.b.{name}": tensor for name, tensor in tensors.items()}
    save_file({**stored, "norm.weight": torch.ones(16)}, folder / "model.safetensors")
    return VerifierCheckpoint(folder)


def section(**weights: Any) -> dict[str, Any]:
    """Ours for integers, its weights changed."""
    content = quantization_section("int")
    content["config_groups"]["group_0"]["weights"] |= weights
    return content


def original() -> torch.Tensor:
    return torch.randn(16, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("number", [Int8Format(), E4M3Format()], ids=["int", "float"])
def test_what_is_written_is_read(number: Any, tmp_path: Path) -> None:
    weight = number.round_weight(original())
    tensors = stored_tensors(weight)
    assert tensors["weight"].dtype == (torch.int8 if isinstance(number, Int8Format) else FLOAT8)
    assert tensors["weight_scale"].shape == (16, 1)
    kind = "int" if isinstance(number, Int8Format) else "float"
    checkpoint = write(tmp_path, quantization_section(kind), tensors)
    assert checkpoint.layer_names == ["a.b"]
    assert checkpoint.plain_names == ["norm.weight"]
    assert checkpoint.own_norms
    assert torch.equal(checkpoint.layer("a.b").dequantize(), weight.dequantize())


def test_the_written_weight_is_what_the_format_says() -> None:
    weight = Int8Format().round_weight(original())
    tensors = stored_tensors(weight)
    meant = tensors["weight"].float() * tensors["weight_scale"].float()
    assert torch.equal(meant, weight.dequantize())
    assert (meant - original()).abs().max() < original().abs().max() / 127


def test_one_scale_for_a_whole_layer(tmp_path: Path) -> None:
    values = torch.randint(-127, 128, (16, 64), dtype=torch.int8)
    checkpoint = write(tmp_path, section(strategy="tensor"), {"weight": values, "weight_scale": torch.tensor([0.25])})
    assert torch.equal(checkpoint.layer("a.b").dequantize(), values.float() * 0.25)
    floats = values.float().clamp(-8, 8).to(FLOAT8)
    content = {**quantization_section("float")}
    content["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"
    checkpoint = write(tmp_path / "b", content, {"weight": floats, "weight_scale": torch.tensor(0.5)})
    layer = checkpoint.layer("a.b")
    assert isinstance(layer, Float8Weight)
    assert torch.equal(layer.dequantize(), floats.float() * 0.5)


def test_zero_points_and_groups(tmp_path: Path) -> None:
    values, zeros = torch.randint(-128, 128, (16, 64), dtype=torch.int8), torch.arange(-8, 8, dtype=torch.int8)[:, None]
    scales = torch.rand(16, 1).half()
    tensors = {"weight": values, "weight_scale": scales, "weight_zero_point": zeros}
    meant = (values.float() - zeros.float()) * scales.float()
    assert torch.equal(write(tmp_path, section(symmetric=False), tensors).layer("a.b").dequantize(), meant)
    scales = torch.rand(16, 2).half()
    layer = write(tmp_path, section(strategy="group", group_size=32), {"weight": values, "weight_scale": scales}).layer(
        "a.b"
    )
    assert torch.equal(layer.dequantize(), values.float() * scales.float().repeat_interleave(32, dim=1))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_packed_integers(bits: int, sym: bool, tmp_path: Path) -> None:
    """Codes along the inputs, zeros along the outputs, both counted from the lowest."""
    weight = make_weight(bits, 64, 32, 32)
    zeros = torch.full_like(weight.zeros, 2 ** (bits - 1)) if sym else weight.zeros.clamp(max=2**bits - 1)
    weight = QuantizedWeight(bits, 32, weight.codes, weight.scales, zeros, weight.g_idx)
    tensors = {
        "weight_packed": pack_columns(weight.codes.t().contiguous(), bits),
        "weight_scale": weight.scales.t().contiguous(),
        "weight_shape": torch.tensor([32, 64]),
    }
    tensors |= {} if sym else {"weight_zero_point": pack_rows(zeros.t().contiguous(), bits)}
    content = section(num_bits=bits, strategy="group", group_size=32, symmetric=sym)
    checkpoint = write(tmp_path, {**content, "format": "pack-quantized"}, tensors)
    assert torch.equal(checkpoint.layer("a.b").dequantize(), weight.dequantize())


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"format": "nvfp4-pack-quantized"}, "has the compressed-tensors format nvfp4-pack-quantized, which"),
        ({"config_groups": {}}, "has no config_groups, which"),
        (section(strategy="block"), "has weights in the strategy block, which"),
        (section(num_bits=5), "has 5-bit weights, which"),
        (section(type="float", num_bits=4), "has floating-point weights in groups or 4 bits, which"),
    ],
)
def test_sections_that_are_not_read(changed: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(QuasarError, match=sentence):
        write(tmp_path, {**section(), **changed}, {})
    assert "int-quantized" in FORMATS


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"weight_scale": torch.ones(16, 1)}, r"layer a\.b has no weight"),
        ({"weight": torch.ones(16, 64), "weight_scale": torch.ones(16, 1)}, r"a weight of shape \(16, 64\) in float32"),
        ({"weight": torch.ones(16, 64).char(), "weight_scale": torch.ones(8, 1)}, r"weight_scale of shape \(8, 1\)"),
        (
            {"weight": torch.ones(16, 64).char(), "weight_scale": torch.full((16, 1), torch.nan)},
            "scales that are not finite",
        ),
    ],
)
def test_tensors_that_do_not_fit(tensors: dict[str, torch.Tensor], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(QuasarError, match=sentence):
        write(tmp_path, section(), tensors).layer("a.b")
