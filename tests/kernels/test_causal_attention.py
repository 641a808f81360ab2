"""Attention of prompts in C++ against plain sums in float64: windows, caps, later chunks, heads as a cache has them."""

import math
from pathlib import Path

import pytest
import torch
from helpers.tiny_model import save_tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.kernels.cpu import causal_attention as module
from quasar_core.kernels.cpu.causal_attention import causal_attention
from quasar_core.models.decoder.attention import FOLDED_TOKENS, attend, make_mask
from quasar_core.models.loading import load_models

CPU = torch.device("cpu")
BFLOAT16 = 2**-8  # the largest rounding error, as a share


def exactly(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
) -> torch.Tensor:
    """The same, a query at a time."""
    mixed = torch.empty_like(queries, dtype=torch.double)
    texts, heads, count, _ = queries.shape
    for text in range(texts):
        for head in range(heads):
            kv = head * keys.shape[1] // heads
            for query in range(count):
                end = keys.shape[2] - count + query + 1
                first = 0 if window is None else max(end - window, 0)
                scores = keys[text, kv, first:end].double() @ queries[text, head, query].double() * scale
                scores = scores if cap is None else cap * (scores / cap).tanh()
                mixed[text, head, query] = scores.softmax(0) @ values[text, kv, first:end].double()
    return mixed


def assert_rounded(found: torch.Tensor, exact: torch.Tensor, values: torch.Tensor) -> None:
    """What is found is off by roundings of shares and of the result alone."""
    assert ((found.double() - exact).abs() <= 3 * BFLOAT16 * values.double().abs().max()).all()
    assert (found.double() - exact).norm() <= 2 * BFLOAT16 * exact.norm()


@given(data=st.data())
@settings(max_examples=30, deadline=None)
@pytest.mark.usefixtures("cpp_pass")
def test_it_is_within_roundings_of_plain_sums(data: st.DataObject) -> None:
    kv_heads, group, texts = (data.draw(st.integers(1, most)) for most in (3, 3, 2))
    count, before = data.draw(st.integers(1, 130)), data.draw(st.sampled_from([0, 0, 1, 47, 48, 100]))
    size, window = data.draw(st.sampled_from([32, 64, 96])), data.draw(st.sampled_from([None, None, 1, 7, 48, 60]))
    cap, spread = data.draw(st.sampled_from([None, 5.0])), data.draw(st.sampled_from([1.0, 6.0]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    queries = spread * torch.randn(texts, count, group * kv_heads, size)
    queries = queries.bfloat16().transpose(1, 2)
    keys, values = torch.randn(2, texts, kv_heads, before + count + 9, size).bfloat16()[:, :, :, : before + count]
    asked = (queries, keys, values, 1 / math.sqrt(size), window, cap)
    assert_rounded(causal_attention(*asked), exactly(*asked), values)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("window", [None, 50])
def test_in_every_form(window: int | None) -> None:
    """Where a form has no products of pairs, it is not asked for, and is right all the same."""
    torch.manual_seed(0)
    queries = torch.randn(1, 4, 70, 64).bfloat16()
    keys, values = torch.randn(2, 1, 2, 103, 64).bfloat16()
    asked = (queries, keys, values, 0.1, window, None)
    assert_rounded(causal_attention(*asked), exactly(*asked), values)


@pytest.mark.usefixtures("cpp_pass")
@pytest.mark.parametrize("window", [None, 60])
def test_a_query_has_the_same_bits_whatever_is_beside_it(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a prompt is cut, with any number of threads."""
    torch.manual_seed(1)
    queries = torch.randn(1, 6, 200, 64).bfloat16()
    keys, values = torch.randn(2, 1, 2, 200, 64).bfloat16()
    whole = causal_attention(queries, keys, values, 0.125, window)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    cut = [
        causal_attention(queries[:, :, begin:end], keys[:, :, :end], values[:, :, :end], 0.125, window)
        for begin, end in ((0, 1), (1, 42), (42, 137), (137, 200))
    ]
    torch.set_num_threads(before)
    assert torch.equal(torch.cat(cut, 2), whole)


@pytest.mark.usefixtures("cpp_pass")
@pytest.mark.parametrize(("start", "window"), [(0, None), (0, 20), (30, None), (30, 33)])
@pytest.mark.parametrize("cap", [None, 10.0])
def test_a_chunk_of_a_prompt_is_attended_to_as_with_a_mask(start: int, window: int | None, cap: float | None) -> None:
    if not module.attends(CPU, torch.bfloat16, 64):
        pytest.skip("PyTorch's attention is as fast here")
    torch.manual_seed(start)
    count = FOLDED_TOKENS + 8
    queries, states = torch.randn(count, 6, 64).bfloat16(), torch.randn(2, 2, 90, 64).bfloat16()
    fast = make_mask(start, count, window, 3, CPU, torch.bfloat16, size=64)
    plain = make_mask(start, count, window, 3, CPU, torch.float64)
    assert fast.in_cpp
    assert fast.added is None
    exact = attend(queries.double(), states.double(), plain, cap=cap)
    assert_rounded(attend(queries, states, fast, cap=cap), exact, states)


def test_what_it_is_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not module.attends(CPU, torch.float32, 64)
    assert not module.attends(CPU, torch.bfloat16, 80)
    monkeypatch.setattr(module, "processor_flags", lambda: frozenset({"amx_bf16", "avx512_bf16"}))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert not module.attends(CPU, torch.bfloat16, 64)
    assert not make_mask(0, 64, None, 1, CPU, torch.bfloat16, size=64).in_cpp


@pytest.mark.parametrize(
    ("flags", "capability", "left_out"),
    [({"amx_bf16"}, "AVX512", []), ({"amx_bf16"}, "AVX2", [False]), ({"avx512_bf16"}, "DEFAULT", [])],
)
def test_pytorchs_fused_attention_is_left_out_where_it_fails(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], capability: str, left_out: list[bool]
) -> None:
    settings = list[bool]()
    monkeypatch.setattr(module, "processor_flags", lambda: frozenset(flags))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cuda, "enable_flash_sdp", settings.append)
    module._leave_out_what_fails()
    assert settings == left_out
    said = f"attention: not PyTorch's fused kernel, which fails at ATEN_CPU_CAPABILITY {capability} on"
    assert (module.describe_left_out() or "").startswith(said) == bool(left_out)


def test_that_it_is_left_out_stands_among_the_notes_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "processor_flags", lambda: frozenset({"amx_bf16"}))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    notes = load_models(save_tiny_model(tmp_path / "tiny"), None, CPU, torch.float32).notes
    assert sum(note.startswith("attention: not PyTorch's fused kernel") for note in notes) == 1
