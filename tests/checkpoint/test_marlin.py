"""Which checkpoints run on Marlin, and the sizes of layers that their headers tell."""

import json
from pathlib import Path

import pytest
import torch
from helpers.packed_weights import make_weight
from safetensors.torch import save_file

from quasar_core.checkpoint.compressed_tensors import quantization_section, stored_tensors
from quasar_core.checkpoint.headers import StoredLayer, describe_marlin, stored_layers, why_not_marlin
from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.quantize.solve.eight_bit import Int8Format


@pytest.mark.parametrize(
    ("sizes", "sym", "reason"),
    [
        ((4096, 1024, 4, 128), True, None),
        ((4096, 1024, 8, -1), True, None),
        ((128, 64, 4, 32), True, None),
        ((4096, 1024, 4, 128), False, "its codes are asymmetric"),
        ((4096, 1024, 3, 128), True, "it takes 4 and 8 bits, not 3"),
        ((4096, 1024, 4, 256), True, "it takes groups of 32, 64, 128 or a whole row, not 256"),
        ((192, 64, 4, 64), True, "192 inputs are not a multiple of 128"),
        ((128, 96, 4, 32), True, "96 outputs are not a multiple of 64"),
    ],
)
def test_the_rules(sizes: tuple[int, int, int, int], sym: bool, reason: str | None) -> None:
    assert why_not_marlin(StoredLayer("up", *sizes), sym) == reason


def test_one_phrase_for_a_checkpoint() -> None:
    good, bad = StoredLayer("q", 128, 64, 4, 32), StoredLayer("o", 100, 64, 4, 32)
    assert describe_marlin([good, good], sym=True) == "yes"
    assert describe_marlin([good, bad], sym=True) == "no: 100 inputs are not a multiple of 128 (o)"
    assert describe_marlin([bad, good, bad], sym=True) == "no: 100 inputs are not a multiple of 128 (o and 1 more)"


def save(folder: Path, section: dict[str, object], tensors: dict[str, torch.Tensor]) -> VerifierCheckpoint:
    (folder / "config.json").write_text(json.dumps({"quantization_config": section}))
    save_file(tensors, folder / "model.safetensors")
    return VerifierCheckpoint(folder)


def test_sizes_of_layers_with_widths_of_their_own(tmp_path: Path) -> None:
    layers = {
        "a": (4, 96, 16, 32),
        "b": (8, 64, 32, -1),
        "c": (3, 96, 32, 32),
        "d": (4, 80, 16, 32),
        "e": (4, 128, 16, 64),
    }
    tensors = {}
    for name, (bits, inputs, outputs, group) in layers.items():
        tensors |= {f"{name}.{suffix}": t for suffix, t in make_weight(bits, inputs, outputs, group).pack().items()}
    del tensors["d.g_idx"]
    checkpoint = save(tmp_path, {"quant_method": "gptq", "bits": 4, "group_size": 32}, tensors)
    assert stored_layers(checkpoint) == [
        StoredLayer(name, inputs, outputs, bits, group) for name, (bits, inputs, outputs, group) in layers.items()
    ]
    for name, (bits, _, _, group) in layers.items():
        assert (checkpoint.layer(name).bits, checkpoint.layer(name).group_size) == (bits, group)


def test_sizes_of_8_bit_layers(tmp_path: Path) -> None:
    tensors = stored_tensors(Int8Format().round_weight(torch.randn(24, 40)))
    checkpoint = save(tmp_path, quantization_section("int"), {f"a.{name}": t for name, t in tensors.items()})
    assert stored_layers(checkpoint) == [StoredLayer("a", 40, 24, 8, -1)]
    assert stored_layers(checkpoint)[0].weights == 960
