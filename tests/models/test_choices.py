"""Choices and margins, on the host and as a device gives them: the first of equals, no token without numbers."""

import math
from importlib.util import find_spec

import pytest
import torch
from helpers.interpret import interpret_on_cpu
from helpers.tiny_models import TableModel

from quasar_core.models import base
from quasar_core.models.base import NO_TOKEN, Choices, best_tokens, bring_over, choose_best, join_choices

LOGITS = torch.tensor([[0.5, 3.0, 3.0, -1.0], [-2.0, -2.5, -9.0, -7.0], [1.0, 0.0, 0.25, 4.5]])
TOKENS, MARGINS = [1, 0, 3], [0.0, 0.5, 3.5]
INF, NAN = math.inf, math.nan
ODD = torch.tensor(
    [[NAN, 0.0, 1.0], [0.0, NAN, 9.0], [2.0, 1.0, NAN], [-INF] * 3, [0.0, INF, 1.0], [INF, INF, -INF], [INF, NAN, 0.0]]
)
LEFT_OUT = torch.tensor([[-INF, 0.0, -INF], [-INF, 1.0, 0.5]])  # a model may rule tokens out
ROUTES = {"host": base._best_on_host, "torch": base._best_in_torch, "triton": base._best_in_triton}


@pytest.fixture(params=ROUTES)
def best(request: pytest.FixtureRequest) -> object:
    if request.param == "triton":
        if find_spec("triton") is None:
            pytest.skip("Triton is not installed")
        interpret_on_cpu()
    return ROUTES[request.param]


def test_the_first_of_equals_is_chosen_and_its_margin_is_nothing(best: object) -> None:
    found = bring_over(*best(LOGITS))  # type: ignore[operator]
    assert found == Choices(TOKENS, MARGINS)


def test_without_a_finite_best_logit_there_is_no_token(best: object) -> None:
    assert best(ODD)[0].tolist() == [NO_TOKEN] * len(ODD)  # type: ignore[operator]


def test_tokens_that_are_ruled_out_leave_the_others(best: object) -> None:
    tokens, margins = best(LEFT_OUT)  # type: ignore[operator]
    assert (tokens.tolist(), margins.tolist()) == ([1, 1], [INF, 0.5])


@pytest.mark.parametrize("seed", range(5))
def test_every_route_chooses_as_torch_does(best: object, seed: int) -> None:
    logits = torch.randn(3, 301, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    tokens, margins = best(logits)  # type: ignore[operator]
    expected = logits.topk(2, dim=-1).values
    assert tokens.tolist() == logits.argmax(dim=-1).tolist()
    assert torch.allclose(margins, expected[:, 0] - expected[:, 1])


LIKELIEST = {
    "host": base.likeliest_tokens,
    "torch": lambda logits, count: base.likeliest_in_torch(logits, count).tolist(),
    "triton": lambda logits, count: likeliest_in_triton(logits, count),
}


def likeliest_in_triton(logits: torch.Tensor, count: int) -> list[list[int]]:
    from quasar_core.kernels.triton.choices import likeliest_tokens

    found = torch.empty(len(logits), count, dtype=torch.int32)
    likeliest_tokens(logits, found)
    return found.tolist()


def stably_sorted(logits: torch.Tensor, count: int) -> list[list[int]]:
    """The oracle: all of a row in falling order, equal ones in the order of their tokens."""
    order = [sorted(range(len(row)), key=lambda token, row=row: -row[token])[:count] for row in logits.tolist()]  # type: ignore[misc]
    return [[*tokens, *[NO_TOKEN] * (count - len(tokens))] for tokens in order]


@pytest.fixture(params=LIKELIEST)
def likeliest(request: pytest.FixtureRequest) -> object:
    if request.param == "triton":
        if find_spec("triton") is None:
            pytest.skip("Triton is not installed")
        interpret_on_cpu()
    return LIKELIEST[request.param]


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("width", [3, 64, 301, 2100])
@pytest.mark.parametrize("grain", [0, 1, 3])
def test_the_likeliest_tokens_are_those_of_a_stable_sort(likeliest: object, width: int, count: int, grain: int) -> None:
    """Coarse logits are full of ties, zeros of both signs among them."""
    logits = torch.randn(3, width, generator=torch.Generator().manual_seed(width)).round(decimals=grain)
    assert likeliest(logits, count) == stably_sorted(logits, count)  # type: ignore[operator]


def test_where_there_is_no_choice_none_is_likely(likeliest: object) -> None:
    assert likeliest(ODD, 2) == [[NO_TOKEN] * 2] * len(ODD)  # type: ignore[operator]
    assert likeliest(LEFT_OUT, 3) == [[1, NO_TOKEN, NO_TOKEN], [1, 2, NO_TOKEN]]  # type: ignore[operator]


def test_no_more_than_a_pass_lists_may_be_asked_for() -> None:
    with pytest.raises(ValueError, match="at most 8 tokens of a row, not 9"):
        choose_best(LOGITS, 9)


def test_margins_may_be_of_other_logits_than_the_choice() -> None:
    assert bring_over(best_tokens(-LOGITS)[0], best_tokens(LOGITS)[1]) == Choices([3, 2, 1], MARGINS)


def test_drawn_tokens_come_with_margins_or_without() -> None:
    assert bring_over(torch.tensor([2, 2, 2]), best_tokens(LOGITS)[1]) == Choices([2, 2, 2], MARGINS)
    assert bring_over(torch.tensor([7])) == Choices([7], [])


def test_what_a_device_gives_comes_over_whole() -> None:
    tokens = torch.tensor([151_935, NO_TOKEN])
    on_device = type("OnDevice", (), {"device": torch.device("cuda"), "double": tokens.double})()
    found = bring_over(on_device, torch.tensor([0.25, 1e-6]))
    assert found.tokens == [151_935, NO_TOKEN]
    assert found.margins == pytest.approx([0.25, 1e-6])


def test_the_parts_of_a_pass_are_joined_and_its_count_is_left_to_the_host() -> None:
    parts = [Choices([1, 2], [0.5, 0.25], 1, [[1, 4], [2, 5]]), Choices([3], [0.0], 0, [[3, 0]])]
    assert join_choices(parts) == Choices([1, 2, 3], [0.5, 0.25, 0.0], None, [[1, 4], [2, 5], [3, 0]])
    assert join_choices(parts[:1]) is parts[0]


def test_a_model_chooses_the_best_of_its_own_logits() -> None:
    model = TableModel(11, seed=2)
    cache = model.new_cache(8)
    expected = choose_best(model.forward([1, 2, 3], cache), 4)
    cache.rollback(0)
    assert model.choose([1, 2, 3], cache, 4) == expected
    assert cache.length == 3
