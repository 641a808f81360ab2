"""The pass in Triton's kernels, through its interpreter, computes what PyTorch's operations compute."""

from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.decoder_cases import CASES as DECODER_CASES
from helpers.decoder_cases import CPU, FLOAT, YARN, random_tokens, save_model
from helpers.interpret import triton_steps
from helpers.quantized_decoder import quantize_layers

from quasar_core.kernels.select import KernelChoice
from quasar_core.kernels.triton.adapters import TRITON_INT8, TritonKernel
from quasar_core.models.base import choose_best, likeliest_tokens
from quasar_core.models.cuda import choose as choosing
from quasar_core.models.cuda.graph_pass import CudaPass
from quasar_core.models.cuda.products import DenseChoices, tune_products
from quasar_core.models.decoder.layer import DenseLinear, FusedLinear
from quasar_core.models.weights.lean_weights import attach_verifier, load_target
from tools.gpu_bench.models import RoundedCopy, in_groups, to_integers

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
FEW = {"num_attention_heads": 2, "num_key_value_heads": 1}  # heads: the interpreter takes its time for each
GROWING = {**YARN, "original_max_position_embeddings": 4, "llama_4_scaling_beta": 0.4}  # from the fifth token on
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "norms of heads, three queries a key": ("Qwen3", {"head_dim": 32, "num_attention_heads": 6}),
    "window": ("Mistral", {"sliding_window": 7}),
    "biases": ("Qwen2", {}),
    "gemma 2": ("Gemma2", {"head_dim": 32, "sliding_window": 7, "attn_logit_softcapping": 2.0}),
    "gemma 3": ("Gemma3", {"head_dim": 32, "sliding_window": 7}),
    "gemma 4": DECODER_CASES["gemma 4, shared states and own inputs"],
    "norms after the rotation": ("HunYuanDenseV1", {"head_dim": 32}),
    "norms of rows": ("Olmo3", {"sliding_window": 7}),
    "interleaved halves rotate": ("Glm4", {"head_dim": 32}),
    "queries grow": ("Ministral3", {"head_dim": 32, "rope_parameters": GROWING}),
    "multipliers": ("Granite", {"residual_multiplier": 0.3, "attention_multiplier": 0.1, "logits_scaling": 2.0}),
    "no gates": ("Arcee", {}),
    "gates of the mix": ("MuseGlimmer", {"head_dim": 32, "sliding_window": 7, "post_norm_eps": 0.1}),
    "layers without rotation": ("SmolLM3", {"no_rope_layer_interval": 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_as_near_to_float32_as_those_of_plain_passes(tmp_path: Path, name: str) -> None:
    """In float16, to which the interpreter rounds as a GPU does; its bfloat16 is cut off."""
    kind, options = CASES[name]
    many = {} if name in ("biases", "norms of heads, three queries a key") else FEW
    save_model(tmp_path, kind, {"num_hidden_layers": 2, **many, **options})
    tokens, ends = random_tokens(28), [0, 5, 6, 10]  # the interpreter takes its time for each token
    ends += [26] if name == "window" else []
    logits = {}
    for way, dtype in (("exact", FLOAT), ("plain", torch.float16), ("triton", torch.float16)):
        decoder = load_target(tmp_path, CPU, dtype)
        if way == "triton":
            decoder.fast = CudaPass(decoder, triton_steps())
        cache = decoder.new_cache(40)
        logits[way] = torch.cat([decoder.forward(tokens[a:b], cache) for a, b in pairwise(ends)])
    errors = {way: (logits[way] - logits["exact"]).norm() / logits["exact"].norm() for way in ("plain", "triton")}
    assert errors["triton"] <= 8 * 2**-11, errors  # roundings of float16


@pytest.mark.parametrize("count", [1, 3, 5])
def test_choices_are_those_of_the_logits(tmp_path: Path, count: int) -> None:
    """A draft of the pass's own choices is accepted up to where it is changed; a pass of 3 or 5 is filled up."""
    save_model(tmp_path, "Llama", {"num_hidden_layers": 1, **FEW})
    decoder = load_target(tmp_path, CPU, torch.float16)
    decoder.fast = CudaPass(decoder, triton_steps())
    tokens, cache = [7], decoder.new_cache(40)
    for _ in range(count - 1):
        tokens += choose_best(decoder.forward(tokens[-1:], cache)).tokens
    for changed in range(1, count + 1):
        offered = [*tokens[:changed], *[token ^ 1 for token in tokens[changed:]]]
        cache.rollback(0)
        logits = decoder.forward(offered, cache)
        expected = choose_best(logits)
        cache.rollback(0)
        found = decoder.choose(offered, cache, 4)
        assert (found.tokens, found.accepted) == (expected.tokens, changed - 1)
        assert found.likeliest == likeliest_tokens(logits, 4)
        assert found.margins == pytest.approx(expected.margins, abs=1e-6)


def test_a_pass_on_8_bit_products_computes_what_pytorchs_product_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to sixteen tokens go through Triton, more through PyTorch: the same rounding, the same logits.

    Norms and gates yield rows that are rounded already; attention's output is rounded by a launch of its own.
    """
    triton_steps()
    from quasar_core.kernels.triton import eight_bit

    rounded_apart: list[int] = []

    def quantize_rows(x: torch.Tensor, *out: torch.Tensor) -> None:
        rounded_apart.append(len(x))
        original(x, *out)

    original = eight_bit.quantize_rows
    monkeypatch.setattr(eight_bit, "quantize_rows", quantize_rows)
    save_model(tmp_path, "Llama", {"num_hidden_layers": 2, "attention_bias": True, **FEW})
    target = load_target(tmp_path, CPU, torch.float16)
    rounded = RoundedCopy(target, to_integers, None)
    monkeypatch.setattr(TRITON_INT8, "why_not", lambda *given: None)
    tokens = random_tokens(28)
    logits = []
    for name in ("int8", "triton-int8"):
        verifier = attach_verifier(target, rounded, name)
        assert {layer.choice.kernel.name for layer in verifier.packed_layers} == {name}
        verifier.fast = CudaPass(verifier, triton_steps())
        cache = verifier.new_cache(40)
        passes = ((0, 5), (5, 6), (6, 8), (8, 28))
        logits.append(torch.cat([verifier.forward(tokens[a:b], cache) for a, b in passes]))
    torch.testing.assert_close(logits[0], logits[1], atol=2e-3, rtol=2e-3)
    assert rounded_apart == [8, 8, 1, 1, 2, 2]  # of two layers


@pytest.mark.parametrize("rounds_gates", [True, False])
def test_gates_of_attentions_mix_read_the_rows_that_queries_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds_gates: bool
) -> None:
    """Rounded by the norm where both products take such rows; else each has them in its own form."""
    triton_steps()
    save_model(tmp_path, "MuseGlimmer", {"num_hidden_layers": 1, "head_dim": 32, **FEW})
    target = load_target(tmp_path, CPU, torch.float16)
    monkeypatch.setattr(TRITON_INT8, "why_not", lambda *given: None)
    logits, tokens = [], random_tokens(9)
    for name in ("int8", "triton-int8"):
        verifier = attach_verifier(target, RoundedCopy(target, to_integers, None), name)
        if not rounds_gates:
            (layer,), (own,) = verifier.layers, target.layers
            verifier.layers = (replace(layer, mix_gate=own.mix_gate),)
        verifier.fast, cache = CudaPass(verifier, triton_steps()), verifier.new_cache(40)
        logits.append(torch.cat([verifier.forward(part, cache) for part in (tokens[:5], tokens[5:])]))
    read_together = verifier.fast._reader(verifier.layers[0], 4) is not None
    assert read_together == rounds_gates
    torch.testing.assert_close(logits[0], logits[1], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("kernel", [None, "triton"])
def test_a_gate_may_join_its_product(tmp_path: Path, kernel: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """16-bit products and packed ones; what a measurement may choose on a GPU is chosen by hand here."""
    steps = triton_steps()
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "mlp_bias": True}
    save_model(tmp_path, "Llama", sizes)
    decoder = load_target(tmp_path, CPU, torch.float16)
    if kernel:
        monkeypatch.setattr(TritonKernel, "why_not", lambda *given: None)
        decoder = attach_verifier(decoder, RoundedCopy(decoder, in_groups(4), None), kernel)
    logits = {}
    for way in ("two launches", "one launch"):
        decoder.fast = fast = CudaPass(decoder, steps)
        fast.dense.choose(4)
        assert list(fast.dense.chosen_gates.values()) == ["two launches" if kernel else "one launch"]
        fast.dense.chosen_gates = dict.fromkeys(fast.dense.chosen_gates, way)
        if way == "one launch":
            monkeypatch.setattr(steps, "gated", lambda *given: pytest.fail("the gate was launched on its own"))
        logits[way] = decoder.forward([5, 6, 7], decoder.new_cache(8))
    torch.testing.assert_close(*logits.values(), atol=4e-3, rtol=4e-3)


def test_one_graph_serves_every_length() -> None:
    assert [triton_steps().bound(length, 9000) for length in (1, 1025, 9000)] == [9000] * 3


def test_gates_that_do_not_fill_blocks_stay_apart(tmp_path: Path) -> None:
    save_model(tmp_path, "Llama", {"num_hidden_layers": 1})
    product, steps = load_target(tmp_path, CPU, torch.float16).layers[0].gate_up, triton_steps()
    assert steps.gated_product(product, 4) is None  # 96 gates
    assert steps.gated_product(DenseLinear(torch.zeros(256, 64)), 4) is not None
    assert steps.gated_product(DenseLinear(torch.zeros(256, 64)), 64) is not None
    assert steps.gated_product(DenseLinear(torch.zeros(256, 64)), 65) is None
    assert steps.gated_product(FusedLinear((product,)), 4) is None


def test_both_ways_of_dense_products_agree(tmp_path: Path) -> None:
    save_model(tmp_path, "Qwen2", {"num_hidden_layers": 1})
    decoder = load_target(tmp_path, CPU, torch.bfloat16)
    ways = triton_steps().dense_products(3)
    assert list(ways) == ["triton", "cublas"]
    assert list(triton_steps().dense_products(65)) == ["cublas"]
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    products = []
    for name in ways:
        steps: Any = SimpleNamespace(
            dense_products=lambda rows, name=name: {name: ways[name]}, gated_product=lambda *given: None
        )
        chosen = DenseChoices(decoder, steps)
        chosen.choose(3)
        products.append(chosen.multiply(decoder.layers[0].qkv, x))
    torch.testing.assert_close(products[0], products[1], atol=2e-2, rtol=2e-2)


def test_block_shapes_are_tuned_for_every_product_of_a_decoder_on_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton_steps()
    from quasar_core.kernels.triton import tune

    given: list[Any] = []

    def tuned(weights: Any, dtype: torch.dtype, progress: Any) -> str:
        given.append((weights, dtype))
        return "2 tuned"

    monkeypatch.setattr(tune, "tune_missing", tuned)
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
    save_model(tmp_path, "Llama", {"num_hidden_layers": 1, **FEW})
    decoder = load_target(tmp_path, CPU, torch.float16)
    events: list[str] = []

    class Pass(CudaPass):
        def __init__(self, *args: Any, fast: bool) -> None:
            events.append("pass")
            super().__init__(*args, fast=fast)

    monkeypatch.setattr(choosing, "CudaPass", Pass)
    monkeypatch.setattr(choosing, "TRIED", (1, 3))  # tokens: a long pass takes the interpreter seconds
    monkeypatch.setattr(choosing, "tune_products", lambda *given, **named: events.append("tune") or "4 tuned in 1.0 s")
    assert "tuned" not in choosing.choose(decoder)[1]  # on the CPU the steps are PyTorch's
    assert events == ["pass"]
    events.clear()
    monkeypatch.setattr(choosing, "choose_steps", lambda device, dtype: (triton_steps(), "Triton's kernels"))
    note = choosing.choose(decoder)[1]
    assert "of Triton's kernels; 4 tuned in 1.0 s; a token's logits do not depend on the tokens beside it" in note
    assert events == ["tune", "pass"]
    monkeypatch.setattr(choosing, "with_joined_attention", lambda apart: (apart, "attention"))
    note = choosing.choose(decoder, fast=True)[1]
    assert "of Triton's kernels; 4 tuned in 1.0 s; norms have launches of their own: rows" in note


def test_launches_overlap_within_their_context(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_steps()
    from quasar_core.kernels.triton.language import overlap, why_not_overlapping
    from quasar_core.models.cuda.triton_steps import TritonSteps

    with TritonSteps(overlaps=True).launching():
        assert overlap() == {"OVERLAPS": True, "launch_pdl": True}
        with TritonSteps().launching():
            assert overlap() == {"OVERLAPS": False}
        assert overlap()["OVERLAPS"]
    assert overlap() == {"OVERLAPS": False}
    assert why_not_overlapping(CPU) == "it needs compute capability 9.0"
    monkeypatch.setenv("QUASAR_OVERLAP", "0")
    assert why_not_overlapping(CPU) == "QUASAR_OVERLAP is 0"


@pytest.mark.parametrize("fails", ["a compiler", "a wrong result"])
def test_where_tritons_kernels_fail_pytorchs_take_their_place(
    tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is raised while they are tuned or tried out, and logits that are not those of plain passes."""
    save_model(tmp_path, "Llama", {"num_hidden_layers": 1})
    decoder, steps = load_target(tmp_path, CPU, torch.float16), triton_steps()
    monkeypatch.setattr(choosing, "choose_steps", lambda device, dtype: (steps, "Triton's kernels"))

    def fail(*given: Any, **named: Any) -> Any:
        raise RuntimeError("PassManager::run failed\nand more")

    if fails == "a compiler":
        monkeypatch.setattr(steps, "normed", fail)
    else:
        monkeypatch.setattr(type(steps), "gated", lambda self, gate_up, *given: gate_up[:, ::2].contiguous() + 3)
    found, note = choosing.choose(decoder)
    assert found is not None
    assert found.steps.name == "PyTorch's operations"
    reason = "PassManager::run failed;" if fails == "a compiler" else "a pass of 1 tokens gives other logits"
    assert f"PyTorch's operations, not Triton's: {reason}" in note


@pytest.mark.parametrize(("sizes", "heads"), [((1, 3), {}), ((5, 17), FEW), ((4, 33), FEW)])
def test_a_tokens_logits_do_not_depend_on_the_tokens_beside_it(
    tmp_path: Path, sizes: tuple[int, int], heads: dict[str, int]
) -> None:
    """To the last bit, in 16 bits, on both sides of where attention is split and where a bucket ends."""
    options = {"num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 128, "max_position_embeddings": 2048}
    save_model(tmp_path, "Qwen3", {**options, "head_dim": 32, **heads})
    decoder = load_target(tmp_path, CPU, torch.float16)
    fast = CudaPass(decoder, triton_steps())
    tokens, (begin, count) = random_tokens(1100), sizes
    cache = decoder.new_cache(1100)
    start = 1022 - begin
    decoder.forward(tokens[:start], cache, last_only=True)
    decoder.fast = fast
    alone = torch.cat([decoder.forward([token], cache) for token in tokens[start : start + 3]])
    cache.rollback(start)
    beside = decoder.forward(tokens[start : start + count], cache)
    assert torch.equal(alone, beside[:3])
    assert fast.longest_tree == 0  # a tree's keys lie in another order
    assert CudaPass(decoder, fast.steps, fast=True).longest_tree == 16
