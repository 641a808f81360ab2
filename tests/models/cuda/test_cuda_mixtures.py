"""Mixtures of experts in the recorded pass, through Triton's interpreter, against the plain decoder."""

from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import CPU, FLOAT, random_tokens, save_model
from helpers.default_share import some
from helpers.interpret import triton_steps
from helpers.late_device import AT_RANDOM, LateDevice

from quasar_core.kernels.triton.adapters import TritonKernel
from quasar_core.models.base import choose_best
from quasar_core.models.cuda import choose as choosing
from quasar_core.models.cuda.graph_pass import CudaPass
from quasar_core.models.cuda.torch_steps import TorchSteps
from quasar_core.models.decoder.activations import activated
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.memory.estimate import LONGEST_PASS
from quasar_core.models.memory.offload import movable_products
from quasar_core.models.weights.lean_weights import attach_verifier, load_target
from tools.gpu_bench.models import RoundedCopy, in_groups

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
SOME = {**SIZES, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 64}
SIGMOIDS = {
    **SIZES,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 1,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen 3 moe": ("Qwen3Moe", {**SOME, "norm_topk_prob": True}),
    "mixtral": ("Mixtral", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64}),
    "qwen 2 moe, some blocks": (
        "Qwen2Moe",
        {**SOME, "shared_expert_intermediate_size": 128, "norm_topk_prob": False, "mlp_only_layers": [1]},
    ),
    "olmoe": ("Olmoe", {**SOME, "intermediate_size": 64, "num_experts_per_tok": 2}),
    "granite moe": (
        "GraniteMoe",
        {
            **SIZES,
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "intermediate_size": 64,
            "residual_multiplier": 0.22,
        },
    ),
    "granite moe shared": (
        "GraniteMoeShared",
        {
            **SIZES,
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "intermediate_size": 64,
            "shared_intermediate_size": 128,
            "residual_multiplier": 0.3,
        },
    ),
    "glm 4 moe": ("Glm4Moe", {**SIGMOIDS, "use_qk_norm": True, "norm_topk_prob": True}),
    "dots 1": ("Dots1", {**SIGMOIDS, "norm_topk_prob": False, "n_group": 1, "topk_group": 1}),
}


def recorded(decoder: LeanDecoder) -> LeanDecoder:
    decoder.fast = CudaPass(decoder, triton_steps())
    return decoder


@pytest.mark.parametrize("name", some(CASES, CASES.keys() - {"olmoe", "granite moe", "dots 1"}))
def test_logits_are_as_near_to_float32_as_those_of_plain_passes(tmp_path: Path, name: str) -> None:
    """In float16, to which the interpreter rounds as a GPU does; its bfloat16 is cut off."""
    kind, options = CASES[name]
    alike = name not in ("qwen 2 moe, some blocks", "glm 4 moe", "dots 1")  # whose blocks differ: one proves two
    save_model(tmp_path, kind, {**options, "num_hidden_layers": 1} if alike else options)
    tokens, logits = random_tokens(12), {}
    for way, dtype in (("exact", FLOAT), ("plain", torch.float16), ("triton", torch.float16)):
        decoder = load_target(tmp_path, CPU, dtype)
        if way == "triton":
            assert choosing.why_not(decoder) is None
            assert choosing.why_not_mixed(decoder, triton_steps(), "") is None
            recorded(decoder)
        cache = decoder.new_cache(40)
        logits[way] = torch.cat([decoder.forward(tokens[a:b], cache) for a, b in ((0, 5), (5, 6), (6, 12))])
    errors = {way: (logits[way] - logits["exact"]).norm() / logits["exact"].norm() for way in ("plain", "triton")}
    assert errors["triton"] <= max(1.5 * errors["plain"], 8 * 2**-11), errors  # roundings of float16


def codes_of(target: LeanDecoder, bits: int, monkeypatch: pytest.MonkeyPatch) -> LeanDecoder:
    """A verifier whose experts, and all else, are codes on Triton's kernel."""
    monkeypatch.setattr(TritonKernel, "why_not", lambda *given: None)
    return attach_verifier(target, RoundedCopy(target, in_groups(bits), None))


WIDE = {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 64}  # of whole groups


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        *(("qwen 3 moe", 8), ("qwen 2 moe, some blocks", 4)),
        pytest.param("qwen 3 moe", 4, marks=pytest.mark.slow),
        pytest.param("qwen 2 moe, some blocks", 8, marks=pytest.mark.slow),
    ],
)
def test_codes_give_the_logits_that_their_weights_give(
    tmp_path: Path, bits: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of experts, of the one of every token, and of a dense block, as near to float32 as dequantized weights are."""
    kind, options = CASES[name]
    save_model(tmp_path, kind, {**options, **WIDE, "intermediate_size": 128})
    target, tokens = load_target(tmp_path, CPU, torch.float16), random_tokens(9)
    exact, logits = load_target(tmp_path, CPU, FLOAT), dict[str, torch.Tensor]()
    copy = RoundedCopy(target, in_groups(bits), None)
    models = {"exact": attach_verifier(exact, copy, "dense"), "plain": attach_verifier(target, copy, "dense")}
    models["triton"] = recorded(codes_of(target, bits, monkeypatch))
    for way, model in models.items():
        cache = model.new_cache(40)
        logits[way] = torch.cat([model.forward(part, cache) for part in (tokens[:3], tokens[3:4], tokens[4:])])
    assert {layer.choice.kernel.name for layer in models["triton"].packed_layers} == {"triton"}
    errors = {way: (logits[way] - logits["exact"]).norm() / logits["exact"].norm() for way in ("plain", "triton")}
    assert 0 < errors["triton"] <= max(1.5 * errors["plain"], 8 * 2**-11), errors


@pytest.mark.parametrize("bits", [16, 4])
def test_a_tokens_logits_do_not_depend_on_the_tokens_beside_it(
    tmp_path: Path, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, however a text is cut. Of more than 16 tokens the kernels' own tests tell: see there."""
    kind, options = CASES["qwen 2 moe, some blocks"]
    save_model(tmp_path, kind, {**options, **WIDE, "intermediate_size": 128})
    decoder = load_target(tmp_path, CPU, torch.float16)
    decoder = recorded(decoder if bits == 16 else codes_of(decoder, bits, monkeypatch))
    tokens, logits = random_tokens(12), []
    for cuts in ((0, 12), (0, 1, 3, 6, 12)):
        cache = decoder.new_cache(40)
        logits.append(torch.cat([decoder.forward(tokens[a:b], cache) for a, b in pairwise(cuts)]))
    assert torch.equal(logits[0], logits[1])


def test_a_draft_is_confirmed_by_the_devices_own_choices(tmp_path: Path) -> None:
    save_model(tmp_path, "Qwen3Moe", {**SOME, "num_hidden_layers": 1})
    decoder = recorded(load_target(tmp_path, CPU, torch.float16))
    tokens, cache = [7], decoder.new_cache(40)
    for _ in range(4):
        tokens += choose_best(decoder.forward(tokens[-1:], cache)).tokens
    for changed in range(1, 6):
        cache.rollback(0)
        found = decoder.choose([*tokens[:changed], *[token ^ 1 for token in tokens[changed:]]], cache)
        assert (found.accepted, found.tokens[:changed]) == (changed - 1, [*tokens, found.tokens[-1]][1 : changed + 1])


def test_the_nodes_of_a_tree_choose_their_own_experts(tmp_path: Path) -> None:
    save_model(tmp_path, "Mixtral", {**CASES["mixtral"][1], "num_hidden_layers": 1})
    logits = {}
    for way, dtype in (("exact", FLOAT), ("triton", torch.float16)):
        decoder = load_target(tmp_path, CPU, dtype)
        cache = decoder.new_cache(40)
        decoder.forward([5, 6, 7], cache)
        if way == "triton":
            decoder.fast = CudaPass(decoder, triton_steps(), fast=True)
        logits[way] = decoder.forward_tree([8, 9, 10, 11, 12], [-1, 0, 0, 2, 1], cache)
    assert (logits["triton"] - logits["exact"]).norm() <= 8 * 2**-11 * logits["exact"].norm()


def test_the_kernels_take_the_longest_recorded_pass() -> None:
    triton_steps()
    from quasar_core.kernels.triton.routed import MOST_TOKENS

    assert MOST_TOKENS == LONGEST_PASS


def test_more_tokens_than_a_launch_takes_go_in_parts(tmp_path: Path) -> None:
    """As of a pass over streamed weights; the last few choose nobody, and have the expert of every token alone."""
    triton_steps()
    from quasar_core.models.cuda.mixtures import RoutedExperts

    save_model(tmp_path, *CASES["glm 4 moe"])
    experts = load_target(tmp_path, CPU, torch.float16).layers[1].experts
    assert experts is not None
    assert experts.shared is not None
    x = torch.randn(90, 64, generator=torch.Generator().manual_seed(0)).half()
    gate_up, down = experts.shared
    always = down(activated(gate_up(x), "silu"))
    found = RoutedExperts(experts)(x, torch.tensor([86]), always)
    expected = experts(x, "silu")
    assert (found[:87] - expected[:87]).float().norm() <= 8 * 2**-11 * expected.float().norm()
    assert torch.equal(found[87:], always[87:])


def test_tokens_that_fill_up_a_pass_choose_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So no expert is read for them alone."""
    steps = triton_steps()
    from quasar_core.models.cuda import mixtures

    save_model(tmp_path, *CASES["qwen 3 moe"])
    decoder, seen = load_target(tmp_path, CPU, torch.float16), list[list[bool]]()
    decoder.fast = CudaPass(decoder, steps)
    original = mixtures.multiply_routed

    def multiply(*given: Any, **named: Any) -> None:
        seen.append((given[2] >= 0).all(-1).tolist())
        original(*given, **named)

    monkeypatch.setattr(mixtures, "multiply_routed", multiply)
    decoder.forward([5, 6, 7, 8, 9], decoder.new_cache(40))
    assert seen == [[True] * 5 + [False] * 3] * 4  # of two blocks, twice


def test_what_keeps_a_mixture_from_being_recorded_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = triton_steps()

    def obstacle(options: dict[str, Any]) -> str | None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        save_model(folder, "Qwen3Moe", {**SOME, **options})
        return choosing.why_not_mixed(load_target(folder, CPU, torch.float16), steps, "")

    assert obstacle({}) is None
    assert obstacle({"moe_intermediate_size": 96}) == "its experts' 96 gates are not a multiple of 64"
    assert obstacle({"hidden_act": "gelu_pytorch_tanh"}) == (
        "its experts' gates are of gelu_tanh, and the kernels know silu"
    )
    save_model(tmp_path / "m", "Qwen3Moe", {**SOME, **WIDE, "intermediate_size": 128})
    target = load_target(tmp_path / "m", CPU, torch.float16)
    assert choosing.why_not(target) is None
    without = choosing.why_not_mixed(target, TorchSteps(), "PyTorch's operations, not Triton's: of some reason")
    assert without == (
        "experts are chosen on the way, which only Triton's kernels do within a graph "
        "(PyTorch's operations, not Triton's: of some reason)"
    )
    other = attach_verifier(target, RoundedCopy(target, in_groups(4), None), "dense")
    assert choosing.why_not_mixed(other, steps, "") == "its experts run on another kernel than Triton's"


def test_some_experts_that_are_not_packed_alike_are_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path, "Qwen3Moe", {**SOME, **WIDE, "intermediate_size": 128})
    target = load_target(tmp_path, CPU, torch.float16)
    copy = RoundedCopy(target, in_groups(4), None)
    del copy._ways["model.layers.1.mlp.experts.3.down_proj"]
    monkeypatch.setattr(TritonKernel, "why_not", lambda *given: None)
    verifier = attach_verifier(target, copy)
    assert choosing.why_not_mixed(verifier, triton_steps(), "") == "the experts' weights are not alike"


def test_a_mixture_is_tried_out_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of `choose`, but for the device."""
    save_model(tmp_path, "Qwen3Moe", {**SOME, "max_position_embeddings": 2048, "norm_topk_prob": True})
    decoder, steps = load_target(tmp_path, CPU, torch.float16), triton_steps()
    monkeypatch.setattr(choosing, "choose_steps", lambda *given: (steps, "Triton's kernels"))
    monkeypatch.setattr(choosing, "TRIED", (1, 3))
    found, note = choosing.choose(decoder)
    assert isinstance(found, CudaPass)
    assert "experts are chosen on the device" in note

    def fail(found: CudaPass) -> None:
        raise RuntimeError("out of something")

    monkeypatch.setattr(choosing, "try_out", fail)
    found, note = choosing.choose(decoder)
    assert found is None
    assert note == f"passes: PyTorch's operations, not recorded: {choosing.ONLY_TRITON} (out of something)"


def test_attention_may_be_streamed_beside_experts_that_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In passes of one sweep, longer than recorded ones."""
    save_model(tmp_path, *CASES["qwen 3 moe"])
    tokens, device = random_tokens(50), LateDevice(AT_RANDOM).watch(monkeypatch)
    movable, _ = movable_products(tmp_path, None)
    exact = load_target(tmp_path, CPU, FLOAT).forward(tokens, load_target(tmp_path, CPU, FLOAT).new_cache(64))
    decoder = load_target(tmp_path, CPU, torch.float16, streamed=movable, link=device.link(frozenset([0, 1])))
    recorded(decoder)
    assert choosing.why_not_mixed(decoder, triton_steps(), "") is None
    cache = decoder.new_cache(64)
    logits = torch.cat([decoder.forward(part, cache) for part in (tokens[:1], tokens[1:46], tokens[46:])])
    assert (logits - exact).norm() <= 16 * 2**-11 * exact.norm()
    assert device.wrong == []
