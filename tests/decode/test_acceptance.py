"""Acceptance with logits written by hand, and the confirm's theorem by enumeration."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.decode import sampling
from quasar_core.decode.sampling import accept_matching, confirm_sampled, residual

GENERATOR = torch.Generator()


def one_hot(*tokens: int, vocabulary: int = 4) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(tokens), vocabulary).float()


@pytest.mark.parametrize(
    ("choices", "offered", "expected"),
    [
        ([5], [], (0, 5)),
        ([1, 2, 3], [1, 2], (2, 3)),
        ([1, 9, 3], [1, 2], (1, 9)),
        ([7, 2, 3], [1, 2], (0, 7)),  # what follows a refused token is never accepted
    ],
)
def test_tokens_are_accepted_until_the_first_difference(
    choices: list[int], offered: list[int], expected: tuple[int, int]
) -> None:
    assert accept_matching(choices, offered) == expected


def test_a_confirm_accepts_what_the_target_is_sure_of() -> None:
    q = torch.full((2, 4), 0.25)
    assert confirm_sampled(one_hot(1, 2, 3), q, [1, 2], GENERATOR) == (2, 3)


def test_a_confirm_refuses_what_the_target_never_says() -> None:
    q = torch.full((2, 4), 0.25)
    assert confirm_sampled(one_hot(1, 2, 3), q, [1, 0], GENERATOR) == (1, 2)
    assert confirm_sampled(one_hot(1, 2, 3), q, [3, 2], GENERATOR) == (0, 1)


@pytest.mark.parametrize(("luck", "accepted"), [(0.0, 1), (0.39, 1), (0.41, 0), (0.99, 0)])
def test_a_token_is_accepted_with_probability_p_over_q(
    luck: float, accepted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, q = torch.tensor([[0.2, 0.8], [1.0, 0.0]]), torch.tensor([[0.5, 0.5]])
    monkeypatch.setattr(sampling.torch, "rand", lambda *_, **__: torch.tensor(luck))
    count, bonus = confirm_sampled(p, q, [0], GENERATOR)
    assert count == accepted
    assert bonus == (0 if accepted else 1)


def test_the_residual_is_where_p_exceeds_q() -> None:
    rest = residual(torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.7, 0.2]))
    assert torch.allclose(rest, torch.tensor([1.0, 0.0, 0.0]))
    p = torch.tensor([0.25, 0.75])
    assert torch.equal(residual(p, p), p)


WEIGHTS = st.lists(st.floats(0.0, 1.0), min_size=5, max_size=5).filter(lambda w: sum(w) > 0.1)


@given(WEIGHTS, WEIGHTS)
@settings(deadline=None, derandomize=True, max_examples=100)
def test_the_committed_token_is_distributed_as_p(p_weights: list[float], q_weights: list[float]) -> None:
    """Σ over x of q(x)·accept(x) at x, and q(x)·(1 − accept(x)) at the residual: Leviathan et al., Theorem 1."""
    p, q = (torch.tensor(w, dtype=torch.float64) for w in (p_weights, q_weights))
    p, q = p / p.sum(), q / q.sum()
    accept = torch.where(q > 0, (p / q).clamp(max=1), torch.ones_like(q))
    marginal = q * accept + (q * (1 - accept)).sum() * residual(p, q)
    assert torch.allclose(marginal, p, atol=1e-9)


def test_many_confirms_draw_from_p() -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]), torch.tensor([[0.1, 0.2, 0.7]])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(q[0], 4000, replacement=True, generator=generator).tolist()
    counts = torch.zeros(3)
    for token in drawn:
        accepted, bonus = confirm_sampled(p, q, [token], generator)
        counts[token if accepted else bonus] += 1
    assert torch.allclose(counts / 4000, p[0], atol=0.03)  # four standard deviations
