"""The pass in Triton's kernels, through its interpreter, computes what PyTorch's operations compute."""

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoder_cases import CPU, FLOAT, random_tokens, save_model
from test_decoder_verifier import quantize_layers

from quasar_core.kernels.select import KernelChoice
from quasar_core.kernels.triton.interpret import interpret_on_cpu
from quasar_core.kernels.triton.kernel import TritonKernel
from quasar_core.models import cuda_pass
from quasar_core.models.cuda_pass import CudaPass
from quasar_core.models.cuda_products import DenseChoices, tune_products
from quasar_core.models.loading import attach_verifier, load_target
from quasar_core.models.pass_steps import Steps

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "norms of heads, three queries a key": ("Qwen3", {"head_dim": 32, "num_attention_heads": 6}),
    "window": ("Mistral", {"sliding_window": 7}),
    "biases": ("Qwen2", {}),
    "layers without rotation": ("SmolLM3", {"no_rope_layer_interval": 2}),
}


def triton_steps() -> Steps:
    interpret_on_cpu()
    from quasar_core.models.triton_steps import TritonSteps

    return TritonSteps()


@pytest.mark.parametrize("name", CASES)
def test_logits_are_as_near_to_float32_as_those_of_plain_passes(tmp_path: Path, name: str) -> None:
    """In float16, to which the interpreter rounds as a GPU does; its bfloat16 is cut off."""
    kind, options = CASES[name]
    save_model(tmp_path, kind, {**options, "num_hidden_layers": 2})
    tokens = random_tokens(28)
    logits = {}
    for way, dtype in (("exact", FLOAT), ("plain", torch.float16), ("triton", torch.float16)):
        decoder = load_target(tmp_path, CPU, dtype)
        if way == "triton":
            decoder.fast = CudaPass(decoder, triton_steps())
        cache = decoder.new_cache(40)
        logits[way] = torch.cat([decoder.forward(tokens[a:b], cache) for a, b in ((0, 5), (5, 6), (6, 10), (10, 28))])
    errors = {way: (logits[way] - logits["exact"]).norm() / logits["exact"].norm() for way in ("plain", "triton")}
    assert errors["triton"] <= 1.3 * errors["plain"], errors


def test_both_ways_of_dense_products_agree(tmp_path: Path) -> None:
    save_model(tmp_path, "Qwen2", {"num_hidden_layers": 1})
    decoder = load_target(tmp_path, CPU, torch.bfloat16)
    ways = triton_steps().dense_products(3)
    assert list(ways) == ["cublas", "triton"]
    assert list(triton_steps().dense_products(17)) == ["cublas"]
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    products = []
    for name in ways:
        chosen = DenseChoices(decoder, lambda rows, name=name: {name: ways[name]})  # type: ignore[misc]
        chosen.choose(3)
        products.append(chosen.multiply(decoder.layers[0].qkv, x))
    torch.testing.assert_close(products[0], products[1], atol=2e-2, rtol=2e-2)


def test_block_shapes_are_tuned_for_every_product_of_a_decoder_on_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton_steps()
    from quasar_core.kernels.triton import tune

    given: list[Any] = []
    monkeypatch.setattr(tune, "tune_missing", lambda weights, dtype: given.append((weights, dtype)) or "2 tuned")
    save_model(tmp_path / "model", "Llama", {"num_hidden_layers": 2})
    target = load_target(tmp_path / "model", CPU, torch.bfloat16)
    checkpoint = quantize_layers(tmp_path / "model", tmp_path / "codes", lambda name: 4)
    verifier = attach_verifier(target, checkpoint, "dense")
    packed = list(verifier.packed_layers)
    packed[0].choice = KernelChoice(TritonKernel(), "by hand")
    for decoder in (target, verifier):
        assert tune_products(decoder) == ""
    assert not given
    cuda = torch.device("cuda")
    for decoder in (target, verifier):
        fields = {name: getattr(decoder, name) for name in ("dtype", "layers", "head", "packed_layers")}
        assert tune_products(SimpleNamespace(device=cuda, **fields)) == "2 tuned"  # type: ignore[arg-type]
    (dense, dtype), (of_verifier, _) = given
    assert dtype == torch.bfloat16
    assert len(dense) == 2 * 4 + 1
    assert dense[-1] is target.head.weight
    assert len(packed) > 1
    assert [weight is packed[0].prepared for weight in of_verifier] == [False] * (len(of_verifier) - 1) + [True]


def test_tuning_comes_before_the_pass_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path, "Llama", {"num_hidden_layers": 1})
    decoder = load_target(tmp_path, CPU, torch.float16)
    events: list[str] = []

    class Pass(CudaPass):
        def __init__(self, *args: Any) -> None:
            events.append("pass")
            super().__init__(*args)

    monkeypatch.setattr(cuda_pass, "CudaPass", Pass)
    monkeypatch.setattr(cuda_pass, "tune_products", lambda decoder: events.append("tune") or "4 tuned in 1.0 s")
    assert "tuned" not in cuda_pass.choose(decoder)[1]  # on the CPU the steps are PyTorch's
    assert events == ["pass"]
    events.clear()
    monkeypatch.setattr(cuda_pass, "choose_steps", lambda device, dtype: (triton_steps(), "Triton's kernels"))
    assert cuda_pass.choose(decoder)[1].endswith("as CUDA graphs of Triton's kernels; 4 tuned in 1.0 s")
    assert events == ["tune", "pass"]
