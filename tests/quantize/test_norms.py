"""Norms of a block in C++: of the formulas that are known, none of others, and gone behind the pass."""

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from quasar_core.quantize.blocks import norms
from quasar_core.quantize.blocks.norms import formula_of, fused_norms

pytestmark = pytest.mark.usefixtures("cpp_pass", "_nothing_tried")


@pytest.fixture
def _nothing_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "_found", {})


class HalvedRMSNorm(LlamaRMSNorm):
    """Named as a norm, and another formula."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) / 2


def made(kind: type[torch.nn.Module], dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    torch.manual_seed(0)
    norm = kind(64)
    torch.nn.init.normal_(norm.weight)  # type: ignore[arg-type]
    return norm.to(dtype)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Olmo2RMSNorm, Gemma3RMSNorm])
@torch.inference_mode()
def test_norms_of_known_formulas_run_in_cpp_inside(kind: type[torch.nn.Module]) -> None:
    block = torch.nn.Sequential(made(kind))
    x = torch.randn(7, 40, 64).bfloat16()
    expected = block(x)
    with fused_norms(block):
        assert "forward" in vars(block[0])
        found = block(x)
        assert torch.equal(block(x.float()), kind.forward(block[0], x.float()))  # type: ignore[arg-type]
    assert "forward" not in vars(block[0])
    torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=0)


@torch.inference_mode()
def test_what_is_no_known_norm_is_left() -> None:
    others = (torch.nn.LayerNorm(64), torch.nn.Linear(64, 64), made(LlamaRMSNorm, torch.float32))
    block = torch.nn.Sequential(made(HalvedRMSNorm), *others)
    assert [formula_of(module) for module in block] == [None] * 4
    with fused_norms(block):
        assert not any("forward" in vars(module) for module in block)


@torch.inference_mode()
def test_another_rounding_would_show() -> None:
    """The trial tells formulas apart that differ by one rounding."""
    x, norm = torch.randn(32, 64).bfloat16(), made(LlamaRMSNorm)
    once = made(Olmo2RMSNorm)
    torch.nn.init.ones_(once.weight)  # type: ignore[arg-type]
    assert formula_of(norm) is not formula_of(once)
    once = made(Olmo2RMSNorm)
    assert not torch.equal(norm(x), once(x))


@torch.inference_mode()
def test_a_norm_that_was_replaced_stays_so() -> None:
    block = torch.nn.Sequential(made(LlamaRMSNorm))
    block[0].forward = lambda x: x + 1  # type: ignore[method-assign]
    with fused_norms(block):
        assert torch.equal(block(torch.zeros(2, 64)), torch.ones(2, 64))
    assert "forward" in vars(block[0])
