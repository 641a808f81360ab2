"""Norms that join the products around them, and attention that rotates and merges by itself: fewer launches."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import CASES as DECODER_CASES
from helpers.decoder_cases import CPU, FLOAT, random_tokens, save_model
from helpers.interpret import triton_steps

from quasar_core.kernels.triton.adapters import TritonKernel
from quasar_core.models.cuda import choose as choosing
from quasar_core.models.cuda.graph_pass import CudaPass
from quasar_core.models.weights.lean_weights import attach_verifier, load_target
from tools.gpu_bench.models import RoundedCopy, in_groups

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

FEW = {"num_attention_heads": 2, "num_key_value_heads": 1}  # heads: the interpreter takes its time for each


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "norms of heads, three queries a key": ("Qwen3", {"head_dim": 32, "num_attention_heads": 6}),
    "window": ("Mistral", {"sliding_window": 7}),
    "gemma 4": DECODER_CASES["gemma 4, shared states and own inputs"],
    "norms of rows": ("Olmo3", {"sliding_window": 7}),
}


PLAIN = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}


@pytest.mark.parametrize(("codes", "count"), [(False, 5), pytest.param(True, 20, marks=pytest.mark.slow)], ids=str)
def test_norms_may_join_the_products_around_them(
    tmp_path: Path, codes: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As near to float32 as passes with norms, in fewer launches; a token's logits do not depend on those beside it."""
    steps = triton_steps()
    save_model(tmp_path, "Llama", {**PLAIN, "attention_bias": True, "mlp_bias": True})
    decoder, exact = load_target(tmp_path, CPU, torch.float16), load_target(tmp_path, CPU, FLOAT)
    if codes:
        monkeypatch.setattr(TritonKernel, "why_not", lambda *given: None)
        rounded = RoundedCopy(decoder, in_groups(4), None)
        decoder, exact = attach_verifier(decoder, rounded, "triton"), attach_verifier(exact, rounded, "reference")
    tokens, logits = random_tokens(count), dict[str, torch.Tensor]()
    for way, joins in (("exact", None), ("apart", False), ("joined", True)):
        model = exact if joins is None else decoder
        if joins is not None:
            model.fast = CudaPass(model, steps, fast=True, joins_norms=joins)
        if joins:
            monkeypatch.setattr(steps, "normed", lambda *given: pytest.fail("a norm was launched on its own"))
        cache = model.new_cache(40)
        logits[way] = torch.cat([model.forward(part, cache) for part in (tokens[:1], tokens[1:3], tokens[3:])])
    errors = {way: (logits[way] - logits["exact"]).norm() / logits["exact"].norm() for way in ("apart", "joined")}
    assert 0 < errors["joined"] <= max(1.5 * errors["apart"], 8 * 2**-11), errors
    cache = decoder.new_cache(40)
    assert torch.equal(decoder.forward(tokens[:3], cache), logits["joined"][:3])
    assert torch.equal(decoder.forward(tokens[3:4], cache), logits["joined"][3:4])


def test_norms_join_only_where_the_products_can_apply_them(tmp_path: Path) -> None:
    triton_steps()
    from quasar_core.models.cuda.joined_norms import why_not_joined

    def obstacle(kind: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> str | None:
        folder = tmp_path / f"{kind} {dtype} {len(list(tmp_path.iterdir()))}"
        save_model(folder, kind, {**PLAIN, **options})
        return why_not_joined(load_target(folder, CPU, dtype))

    more = "its blocks have more than a norm before attention and one before a gated MLP"
    assert obstacle("Llama") is None
    assert obstacle("Llama", torch.float16) == "rows that are not normed yet may be too large for float16"
    assert obstacle("Llama", intermediate_size=96) == more  # gates that do not fill blocks
    assert obstacle("Gemma2", head_dim=32) == more
    assert obstacle("Granite", residual_multiplier=0.3) == more


@pytest.mark.parametrize(("seconds", "joins"), [([2.0, 1.0], True), ([1.0, 2.0], False)])
def test_norms_join_where_that_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: list[float], joins: bool
) -> None:
    steps = triton_steps()
    save_model(tmp_path, "Llama", PLAIN)
    apart = CudaPass(load_target(tmp_path, CPU, torch.bfloat16), steps, fast=True)
    tried = list[CudaPass]()
    monkeypatch.setattr(choosing, "try_out", tried.append)
    monkeypatch.setattr(choosing, "time_passes", lambda passes, cache: seconds)
    found, note = choosing.with_joined_norms(apart)
    assert found is (tried[0] if joins else apart)
    assert (found.joins_norms, "norms join their products: 1000000 µs" in note) == (joins, joins)

    def fail(*given: Any) -> None:
        raise RuntimeError("PassManager::run failed\nand more")

    monkeypatch.setattr(choosing, "time_passes", fail)
    kept, note = choosing.with_joined_norms(apart)
    assert kept is apart
    failed = "it failed here (PassManager::run failed)"
    assert note == f"norms have launches of their own: joined to their products, {failed}"


@pytest.mark.parametrize(
    ("seconds", "joined"),
    [
        ([[2.0, 1.0], [1.0, 0.5], [0.5, 0.7]], (True, 4)),
        ([[2.0, 1.0], [1.0, 1.5], [1.0, 1.5]], (True, 0)),
        ([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]], (False, 0)),
    ],
)
def test_attention_takes_launches_in_where_that_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: list[list[float]], joined: tuple[bool, int]
) -> None:
    steps, times = triton_steps(), iter(seconds)
    save_model(tmp_path, "Llama", PLAIN)
    apart = CudaPass(load_target(tmp_path, CPU, torch.bfloat16), steps, fast=True, joins_norms=True)
    monkeypatch.setattr(choosing, "try_out", lambda fast: None)
    monkeypatch.setattr(choosing, "time_passes", lambda passes, cache: next(times))
    found, note = choosing.with_joined_attention(apart)
    own: Any = found.steps
    assert (own.joined.turns, own.joined.merges) == joined
    assert found.joins_norms
    assert (found is apart) == (not joined[0])
    names = ("merges in a launch of its own", "merges up to 4 tokens", "merges up to 16 tokens")
    parts = note.split("; ")
    for part, name, (before, after) in zip(parts, names, seconds, strict=True):
        taken = "attention rotates" if after < before else "not taken: attention that rotates"
        assert part.startswith(f"{taken} and {name}: {1e6 * after:.0f} µs for passes of 1 and 8")


@pytest.mark.parametrize(
    ("name", "layers", "count"),
    [
        ("norms of heads, three queries a key", 1, 9),
        *(pytest.param(name, 2, 21, marks=pytest.mark.slow) for name in ("gemma 4", "norms of rows", "window")),
    ],
)
def test_attention_that_rotates_and_merges_leaves_the_same_logits(
    tmp_path: Path, name: str, layers: int, count: int
) -> None:
    """To the last bit, in passes of one launch of attention and of two; queries alone, and norms by PyTorch."""
    steps = triton_steps()
    from quasar_core.models.cuda.triton_steps import Joined, TritonSteps

    kind, options = CASES[name]
    save_model(tmp_path, kind, {"num_hidden_layers": layers, **options, **FEW})
    decoder = load_target(tmp_path, CPU, torch.float16)
    tokens, logits = random_tokens(count), list[torch.Tensor]()
    for own in (steps, TritonSteps(joined=Joined(turns=True, merges=4))):
        decoder.fast, cache = CudaPass(decoder, own), decoder.new_cache(40)
        logits.append(torch.cat([decoder.forward(part, cache) for part in (tokens[:3], tokens[3:4], tokens[4:])]))
    assert torch.equal(*logits)
