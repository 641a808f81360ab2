"""Our tensors in AutoGPTQ 0.7.1's own linear layer, in an environment of its own; `make interop` builds it."""

import importlib.util

import pytest
import torch

from quasar_core.quantize.solve.gptq import SolverConfig, solve

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        importlib.util.find_spec("auto_gptq") is None, reason="AutoGPTQ is not installed; `make interop` installs it"
    ),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_its_layer_multiplies_by_our_codes(bits: int, group_size: int, sym: bool, bias: bool) -> None:
    from auto_gptq.nn_modules.qlinear.qlinear_cuda import QuantLinear

    generator = torch.Generator().manual_seed(bits)
    inputs, outputs = 256, 96
    original = torch.randn(outputs, inputs, generator=generator)
    rows = torch.randn(400, inputs, generator=generator)
    weight = solve(original, rows.t() @ rows, SolverConfig(bits, group_size, sym)).weight
    layer = QuantLinear(bits, group_size, inputs, outputs, bias)
    tensors = {**weight.pack(), **({"bias": torch.randn(outputs, generator=generator).half()} if bias else {})}
    layer.load_state_dict(tensors)
    x = torch.randn(5, inputs, generator=generator)
    expected = torch.nn.functional.linear(x, weight.dequantize(), tensors["bias"].float() if bias else None)
    torch.testing.assert_close(layer.float()(x), expected, rtol=1e-5, atol=1e-4)
    assert (weight.dequantize() - original).norm() < 3 / 2**bits * original.norm()
