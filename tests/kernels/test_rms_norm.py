"""RMS norms in C++ against plain sums in float64, and against the norms of transformers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from quasar_core.kernels.cpu import rms_norm as module
from quasar_core.kernels.cpu.rms_norm import normalises, rms_norm

BFLOAT16 = torch.finfo(torch.bfloat16).eps


def exactly(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """In float64."""
    y = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
    return y if weight is None else y * weight.double()


@given(data=st.data())
@settings(max_examples=40, deadline=None)
@pytest.mark.usefixtures("cpp_pass")
def test_it_is_within_roundings_of_plain_sums(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(1,), (3, 5), (2, 33, 3), (70,)]))
    size, rounds_first = data.draw(st.sampled_from([16, 48, 576])), data.draw(st.booleans())
    torch.manual_seed(data.draw(st.integers(0, 99)))
    x = (data.draw(st.sampled_from([1e-3, 1.0, 50.0])) * torch.randn(*shape, size)).bfloat16()
    kind = data.draw(st.sampled_from([None, torch.float32, torch.bfloat16]))
    weight = None if kind is None else torch.randn(size).to(kind)
    assert normalises(x)
    found, exact = rms_norm(x, weight, 1e-5, rounds_first), exactly(x, weight, 1e-5)
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= 1.1 * BFLOAT16 * exact.abs()).all()


@pytest.mark.parametrize(
    ("kind", "rounds_first", "more"),
    [(LlamaRMSNorm, True, 0.0), (Olmo2RMSNorm, False, 0.0), (Gemma3RMSNorm, False, 1.0)],
)
def test_it_rounds_as_the_norms_of_transformers_do(
    kind: type[torch.nn.Module], rounds_first: bool, more: float
) -> None:
    """But where another order of the sum tips a rounding."""
    torch.manual_seed(1)
    norm, x = kind(96).bfloat16(), torch.randn(50, 96).bfloat16()
    weight = torch.nn.init.normal_(norm.weight.data).float() + more
    eps = getattr(norm, "eps", None) or norm.variance_epsilon
    found, expected = rms_norm(x, weight, eps, rounds_first), norm(x)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=2 * BFLOAT16, atol=0)
    assert (found != expected).float().mean() < 0.001


@pytest.mark.parametrize("rounds_first", [False, True])
def test_what_cpp_does_not_take_is_pytorchs(monkeypatch: pytest.MonkeyPatch, rounds_first: bool) -> None:
    torch.manual_seed(2)
    for x in (torch.randn(4, 32), torch.randn(4, 17).bfloat16()):
        assert not normalises(x)
        weight = torch.randn(x.shape[-1]).to(x)
        bound = 4 * torch.finfo(x.dtype).eps
        torch.testing.assert_close(
            rms_norm(x, weight, 1e-6, rounds_first).double(), exactly(x, weight, 1e-6), rtol=bound, atol=0
        )
    monkeypatch.setattr(module, "why_not_here", lambda: "none was built")
    assert not normalises(torch.randn(4, 32).bfloat16())


@pytest.mark.usefixtures("cpp_pass")
def test_rows_need_not_lie_together_and_threads_change_nothing() -> None:
    torch.manual_seed(3)
    whole = torch.randn(90, 3, 64).bfloat16()
    torch.set_num_threads(1)
    expected = rms_norm(whole[:, 1].contiguous(), None, 1e-6)
    torch.set_num_threads(3)
    assert torch.equal(rms_norm(whole[:, 1], None, 1e-6), expected)
    assert torch.equal(torch.cat([rms_norm(row, None, 1e-6) for row in whole[:, 1].split(7)]), expected)
