"""Products and causal attention of the passes against PyTorch's in float64, and what is left to PyTorch."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear, scaled_dot_product_attention

from quasar_core.quantize.solve import cpp, matmul
from quasar_core.quantize.solve import hessian as hessian_module
from quasar_core.quantize.solve.hessian import HessianAccumulator
from quasar_core.quantize.solve.matmul import FastPasses, add_product_, causal_attention, product, times


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was computed by PyTorch's own functions, and with how many queries."""
    noted: list[str] = []

    def note_linear(*args: Any) -> torch.Tensor:
        noted.append("linear")
        return linear(*args)

    def note_attention(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        noted.append(f"attention {query.shape[-2]}")
        return scaled_dot_product_attention(query, *args, **kwargs)

    monkeypatch.setattr(matmul, "linear", note_linear)
    monkeypatch.setattr(matmul, "scaled_dot_product_attention", note_attention)
    return noted


@pytest.mark.parametrize("shape", [(5,), (2, 3, 7), (64, 130)], ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_a_product_in_float32(shape: tuple[int, ...], biased: bool, calls: list[str]) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(*shape), torch.randn(9, shape[-1])
    bias = torch.randn(9) if biased else None
    exact = linear(left.double(), right.double(), None if bias is None else bias.double())
    torch.testing.assert_close(product(left, right, bias).double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        product(left.mT.contiguous().mT, right, bias) if left.dim() > 1 else exact, exact, check_dtype=False
    )
    if torch.backends.mkldnn.is_available():
        assert calls == []


@pytest.mark.parametrize("what", ["bfloat16", "empty", "strided", "no oneDNN"])
def test_what_is_left_to_pytorch(what: str, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(0 if what == "empty" else 4, 6), torch.randn(3, 6)
    if what == "bfloat16":
        left, right = left.bfloat16(), right.bfloat16()
    if what == "strided":
        right = torch.randn(6, 3).t()
    if what == "no oneDNN":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    torch.testing.assert_close(product(left, right), left @ right.t())
    assert calls == ["linear"]


@pytest.mark.parametrize("length", [1, 64, 150])
def test_causal_attention_takes_a_few_queries_at_a_time(length: int, calls: list[str]) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, length, 8), torch.randn(2, 2, length, 8), torch.randn(2, 2, length, 8)
    options: dict[str, Any] = {"is_causal": True, "scale": 0.3, "enable_gqa": True}
    exact = scaled_dot_product_attention(query.double(), key.double(), value.double(), **options)
    del options["is_causal"]
    found = causal_attention(query, key, value, **options)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert calls == [f"attention {min(64, length - begin)}" for begin in range(0, length, 64)]


def test_causal_attention_in_bfloat16_is_within_its_rounding() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 150, 8).bfloat16() for heads in (4, 2, 2))
    exact = scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True, enable_gqa=True)
    found = causal_attention(query, key, value, enable_gqa=True).double()
    assert (found - exact).norm() < 2**-7 * exact.norm()
    with FastPasses():
        again = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert torch.equal(again.double(), found)


@pytest.mark.parametrize("what", ["mask", "not causal", "float64", "other keys"])
def test_other_attention_is_left_alone(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(matmul, "causal_attention", lambda *args, **_: (calls.append(True), args[0])[1])
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 70, 8), torch.randn(1, 2, 80 if what == "other keys" else 70, 8)
    mask = torch.ones(70, 70, dtype=torch.bool).tril(3) if what == "mask" else None
    if what == "float64":
        query, key = query.double(), key.double()
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": what in ("float64", "other keys")}
    expected = scaled_dot_product_attention(query, key, key, **options)
    with FastPasses():
        torch.testing.assert_close(scaled_dot_product_attention(query, key, key, **options), expected)
        assert calls == []
        scaled_dot_product_attention(*[torch.randn(1, 2, 70, 8)] * 3, is_causal=True)
    assert calls == [True]


def test_linear_layers_inside_a_module() -> None:
    torch.manual_seed(0)
    module, rows = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3, bias=False)), torch.randn(4, 6)
    with FastPasses(), torch.inference_mode():
        found = module(rows)
    first, second = module
    exact = product(product(rows.double(), first.weight.double(), first.bias.double()), second.weight.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [40, 130, 300])
@pytest.mark.parametrize("copied", [2**22, 1000], ids=["at once", "in parts"])
def test_tiles_and_parts_make_the_hessian(columns: int, copied: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the errors' sum: against the sums by hand in float64."""
    monkeypatch.setattr(hessian_module, "COPIED_VALUES", copied)
    torch.manual_seed(0)
    rows, errors = torch.randn(2, 25, columns), torch.randn(2, 25, 7)
    accumulator = HessianAccumulator(columns, rows.device)
    for batch in range(2):
        accumulator.add(rows[batch], errors[batch])
    x, e = (each.flatten(0, 1).double() for each in (rows, errors))
    beside, found = accumulator.errors(), accumulator.finish("x")
    assert beside is not None
    for got, sum_of in ((found, x.t() @ x), (beside, e.t() @ x)):
        torch.testing.assert_close(got.double(), 2 / 50 * sum_of, rtol=1e-4, atol=1e-5)
    assert torch.allclose(found, found.t(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("flags", [{"amx_bf16"}, set()], ids=str)
@pytest.mark.usefixtures("cpp_solver")
def test_sums_over_inputs_in_bfloat16(pairs: bool, flags: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """H and the errors' sum as in float64, whatever the processor multiplies with."""
    monkeypatch.setattr(cpp, "sums_pairs", lambda rows: pairs and rows.dtype == torch.bfloat16)
    monkeypatch.setattr(matmul, "processor_flags", lambda: frozenset(flags))
    torch.manual_seed(0)
    batches, errors = torch.randn(4, 51, 300).bfloat16(), torch.randn(4, 51, 7).bfloat16()
    accumulator = HessianAccumulator(300, batches.device)
    for rows, beside in zip(batches, errors, strict=True):
        accumulator.add(rows, beside)
    x, e = batches.double(), errors.double()
    found, sums = accumulator.errors(), accumulator.finish("x")
    torch.testing.assert_close(sums.double(), 2 / 204 * (x.mT @ x).sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.double(), 2 / 204 * (e.mT @ x).sum(0), rtol=1e-5, atol=1e-5)
    if hasattr(torch.backends.mkldnn, "matmul"):
        assert torch.backends.mkldnn.matmul.fp32_precision != "bf16", "the setting is put back"


@pytest.mark.parametrize("tokens", [1, 2, 511, 1025])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (8, 48), (9, 49), (70, 130)])
@pytest.mark.usefixtures("cpp_solver")
def test_sums_over_tokens_in_cpp(tokens: int, rows: int, columns: int) -> None:
    """Beside what was there already; of a factor with itself, the lower triangle; the same bits with any threads."""
    torch.manual_seed(tokens)
    left, right = torch.randn(tokens, rows).bfloat16(), torch.randn(tokens, columns).bfloat16()
    found, itself = torch.ones(rows, columns), torch.zeros(columns, columns)
    cpp.add_token_sums(left, right, found)
    torch.testing.assert_close(found.double(), 1 + left.double().t() @ right.double(), rtol=1e-4, atol=1e-4)
    cpp.add_token_sums(right, right, itself, lower=True)
    exact = (right.double().t() @ right.double()).tril()
    torch.testing.assert_close(itself.tril().double(), exact, rtol=1e-4, atol=1e-4)
    before, again = torch.get_num_threads(), torch.ones(rows, columns)
    torch.set_num_threads(3)
    cpp.add_token_sums(left, right, again)
    torch.set_num_threads(before)
    assert torch.equal(found, again)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_products_that_are_added_are_those_of_float64(data: st.DataObject) -> None:
    """Of parts of larger matrices too; nothing beside the sums is written."""
    depth, rows, columns = (data.draw(st.integers(least, 150)) for least in (1, 0, 1))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    left, right = torch.randn(depth, rows + 5)[:, 2 : rows + 2], torch.randn(depth, columns + 3)[:, :columns]
    whole = torch.randn(rows + 2, columns + 4)
    before, sums = whole.clone(), whole[1 : rows + 1, 3 : columns + 3]
    expected = sums.double() + left.double().t() @ right.double()
    assert add_product_(sums, left, right) is sums
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-5 * depth**0.5)
    outside = torch.ones_like(whole, dtype=torch.bool)
    outside[1 : rows + 1, 3 : columns + 3] = False
    assert torch.equal(whole[outside], before[outside])


@pytest.mark.parametrize("switched_off", [False, True])
def test_a_symmetric_matrix_times_another(monkeypatch: pytest.MonkeyPatch, switched_off: bool) -> None:
    if switched_off:
        monkeypatch.setenv("QUASAR_CPU_PASS", "0")
    torch.manual_seed(0)
    half, right = torch.randn(70, 70), torch.randn(70, 33)
    torch.testing.assert_close(times(half @ half.t(), right), half @ half.t() @ right, rtol=1e-4, atol=1e-3)
