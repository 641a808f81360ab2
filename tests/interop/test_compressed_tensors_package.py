"""Our W8A8 and fp8 checkpoints in transformers with compressed-tensors, and what that package writes, here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from interop.interop_cases import ARCHITECTURES, CPU, logits_of, missing, our_logits, quantize, save_model
from transformers import AutoModelForCausalLM

from quasar_core.checkpoint.reader import VerifierCheckpoint
from quasar_core.kernels import eight_bit
from quasar_core.kernels.linear import PackedLinear

pytestmark = [pytest.mark.interop, missing("compressed_tensors")]
W8A8 = {"bits": 8, "group_size": -1}


def rows_as_they_round(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows_int8` with this package's scale: the largest magnitude ÷ 127.5. vLLM's and ours is ÷ 127."""
    steps = x.abs().amax(dim=1, keepdim=True) / 127.5
    return torch.round(x / steps).clamp(-128, 127).to(torch.int8), steps


def run_watched(model: Any) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor, Any]]]:
    """Logits, and what entered and left every quantized layer, with the layer."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor, Any]] = {}

    def watch(name: str) -> Any:
        return lambda layer, args, output: seen.update({name: (args[0][0], output[0], layer)})

    layers = {name: module for name, module in model.named_modules() if hasattr(module, "quantization_scheme")}
    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    logits = logits_of(model)
    for handle in handles:
        handle.remove()
    return logits, seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("method", "kernel"), [("w8a8", "int8"), ("fp8", "float8")])
def test_our_checkpoint_computes_the_same_there(
    method: str, kernel: str, architecture: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32: every layer's product with its activations rounded, and the logits with activations left whole.

    The logits of rounded activations are no measure: where the last digit of a float32 decides how one of them is
    rounded, the whole pass goes another way.
    """
    tied = architecture in ("qwen3", "llama")
    folder = quantize(monkeypatch, save_model(tmp_path / "tiny", architecture, tied, dtype), method=method, **W8A8)
    checkpoint = VerifierCheckpoint(folder)
    monkeypatch.setattr(eight_bit, "quantize_rows_int8", rows_as_they_round)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rounded, seen = run_watched(model)
    assert sorted(seen) == checkpoint.layer_names
    for name, (entered, left, layer) in seen.items():
        assert layer.quantization_scheme.input_activations.strategy == "token"
        ours = PackedLinear.build(checkpoint.layer(name), layer.bias, CPU, torch.float32, kernel)
        with torch.no_grad():
            torch.testing.assert_close(left, ours(entered), rtol=1e-5, atol=1e-5 * left.abs().max().item())
        layer.quantization_enabled = False
    theirs, whole = logits_of(model), our_logits(folder, kernel="dense")
    assert not torch.equal(theirs, rounded)
    torch.testing.assert_close(theirs, whole, rtol=0, atol=1e-5 * whole.abs().max().item())


def compress(source: Path, folder: Path, weights: dict[str, Any], activations: dict[str, Any] | None) -> Any:
    """A checkpoint as llm-compressor leaves it: every linear layer but the head, scales from the largest weights."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in model.modules():
        args = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        if args is None:
            continue
        shape = (module.weight.shape[0], -1, args.group_size or module.weight.shape[1])
        grouped = module.weight.data.view(*shape)
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        module.weight_scale.data.copy_(scale)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero)
    expected = {
        name: _rounded(module) for name, module in model.named_modules() if hasattr(module, "quantization_scheme")
    }
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return expected


def _rounded(module: Any) -> torch.Tensor:
    """The weight that a layer's codes stand for, by the package's own arithmetic."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    zero = getattr(module, "weight_zero_point", None)
    return fake_quantize(module.weight, module.weight_scale, zero, module.quantization_scheme.weights)


EIGHT = {"num_bits": 8, "type": "int", "symmetric": True}
PER_TOKEN = {**EIGHT, "strategy": "token", "dynamic": True}
THEIRS = {
    "W8A8": ({**EIGHT, "strategy": "channel"}, PER_TOKEN),
    "fp8": ({**EIGHT, "type": "float", "strategy": "channel"}, {**PER_TOKEN, "type": "float"}),
    "W4A16": ({"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}, None),
    "W4A16, asymmetric": (
        {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32},
        None,
    ),
}


@pytest.mark.parametrize("scheme", THEIRS.values(), ids=THEIRS.keys())
def test_their_checkpoint_is_read(scheme: tuple[dict[str, Any], dict[str, Any] | None], tmp_path: Path) -> None:
    expected = compress(save_model(tmp_path / "tiny", "llama"), tmp_path / "theirs", *scheme)
    checkpoint = VerifierCheckpoint(tmp_path / "theirs")
    assert sorted(checkpoint.layer_names) == sorted(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(checkpoint.layer(name).dequantize(), weight, rtol=1e-3, atol=1e-5)
    assert our_logits(tmp_path / "theirs", kernel="dense").std() > 0.1
