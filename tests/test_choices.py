"""Choices and margins, on the host and as a device gives them: the first of equals, and one transfer."""

from importlib.util import find_spec

import pytest
import torch

from quasar_core.decode import choices
from quasar_core.decode.choices import bring_over, choose_best
from quasar_core.kernels.triton.interpret import interpret_on_cpu

LOGITS = torch.tensor([[0.5, 3.0, 3.0, -1.0], [-2.0, -2.5, -9.0, -7.0], [1.0, 0.0, 0.25, 4.5]])
TOKENS, MARGINS = [1, 0, 3], [0.0, 0.5, 3.5]


def test_the_first_of_equals_is_chosen_and_its_margin_is_nothing() -> None:
    found = choose_best(LOGITS, LOGITS)
    assert found.tokens == TOKENS
    assert found.margins == MARGINS
    assert choose_best(LOGITS).margins == []


def test_margins_may_be_of_other_logits_than_the_choice() -> None:
    found = choose_best(-LOGITS, LOGITS)
    assert found.tokens == [3, 2, 1]
    assert found.margins == MARGINS


def test_drawn_tokens_come_with_margins() -> None:
    found = bring_over(torch.tensor([2, 2, 2]), LOGITS)
    assert (found.tokens, found.margins) == ([2, 2, 2], MARGINS)
    assert bring_over(torch.tensor([7]), None).tokens == [7]


@pytest.mark.parametrize("seed", range(5))
def test_numpy_chooses_as_torch_does(seed: int) -> None:
    logits = torch.randn(9, 301, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    found = choose_best(logits, logits)
    best = logits.topk(2, dim=-1).values
    assert found.tokens == logits.argmax(dim=-1).tolist()
    assert torch.allclose(torch.tensor(found.margins), best[:, 0] - best[:, 1])


def test_what_a_device_gives_comes_over_whole() -> None:
    found = choices._in_one_transfer(torch.tensor([151_935, 0]), torch.tensor([0.25, 1e-6]))
    assert found.tokens == [151_935, 0]
    assert found.margins == pytest.approx([0.25, 1e-6])


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_triton_chooses_as_the_host_does() -> None:
    interpret_on_cpu()
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(3))
    assert choices._choose_in_triton(logits).tokens == choose_best(logits).tokens
    assert choices._choose_in_triton(logits).margins == pytest.approx(choose_best(logits, logits).margins)
