"""Acceptance with logits written by hand, and the confirm's theorem by enumeration."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from helpers.token_confirm import confirm_by_token
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.decode import sampling
from quasar_core.decode.sampling import accept_matching, confirm_block, residual

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
    assert confirm_block(one_hot(1, 2, 3), q, [1, 2], GENERATOR) == (2, 3)


def test_a_confirm_refuses_what_the_target_never_says() -> None:
    q = torch.full((2, 4), 0.25)
    assert confirm_block(one_hot(1, 2, 3), q, [1, 0], GENERATOR) == (1, 2)
    assert confirm_block(one_hot(1, 2, 3), q, [3, 2], GENERATOR) == (0, 1)


@pytest.mark.parametrize(("luck", "accepted"), [(0.0, 1), (0.39, 1), (0.41, 0), (0.99, 0)])
def test_a_token_is_accepted_with_probability_p_over_q(
    luck: float, accepted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, q = torch.tensor([[0.2, 0.8], [1.0, 0.0]]), torch.tensor([[0.5, 0.5]])
    monkeypatch.setattr(sampling.torch, "rand", lambda *shape, **_: torch.full(shape, luck, dtype=torch.double))
    count, bonus = confirm_block(p, q, [0], GENERATOR)
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
        accepted, bonus = confirm_block(p, q, [token], generator)
        counts[token if accepted else bonus] += 1
    assert torch.allclose(counts / 4000, p[0], atol=0.03)  # four standard deviations


Text = tuple[int, ...]


class Trees:
    """Distributions over the next token after every text, the target's and the verifier's; a text ends a window where
    `ends` says so, which looks at that text alone."""

    def __init__(self, seed: int, vocabulary: int, longest: int, distance: float) -> None:
        luck = np.random.default_rng(seed)
        self.vocabulary, self.longest = vocabulary, longest
        texts = [text for n in range(longest + 1) for text in itertools.product(range(vocabulary), repeat=n)]
        logits = {text: luck.normal(size=vocabulary) for text in texts}
        self.q = {text: _softmax(logits[text]) for text in texts}
        self.p = {text: _softmax(logits[text] + distance * luck.normal(size=vocabulary)) for text in texts}
        self.short = {text for text in texts if luck.random() < 0.3}

    def ends(self, text: Text) -> bool:
        return len(text) == self.longest or (len(text) > 0 and text in self.short)

    def windows(self, text: Text = (), chance: float = 1.0) -> Iterator[tuple[Text, float]]:
        """Every window and the verifier's chance of it."""
        if self.ends(text):
            yield text, chance
            return
        for token in range(self.vocabulary):
            yield from self.windows((*text, token), chance * float(self.q[text][token]))


def _softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max())
    return shares / shares.sum()


def outcomes(trees: Trees, window: Text) -> dict[Text, float]:
    """The chance of each committed text, bonus included, of one window: the algorithm with luck integrated."""
    reached = [1.0]
    for i, token in enumerate(window):
        before = window[:i]
        reached.append(min(1.0, reached[-1] * trees.p[before][token] / trees.q[before][token]))
    found: dict[Text, float] = {}
    left = 1.0  # that no longer part was accepted
    for i in range(len(window), -1, -1):
        prefix = window[:i]
        if i == len(window):
            passes, rest = reached[i], trees.p[prefix]
        else:
            rest = np.maximum(reached[i] * trees.p[prefix] - trees.q[prefix], 0)
            total = rest.sum()
            passes = 1.0 if i == 0 or total + 1 <= reached[i] else total / (total + 1 - reached[i])
            rest = rest / total if total > 0 else trees.p[prefix]
        for token in range(trees.vocabulary):
            text = (*prefix, token)
            found[text] = found.get(text, 0.0) + left * passes * float(rest[token])
        left *= 1 - passes
    return found


def commits(trees: Trees) -> dict[Text, float]:
    """The chance of each committed text over all windows."""
    total: dict[Text, float] = {}
    for window, chance in trees.windows():
        for text, share in outcomes(trees, window).items():
            total[text] = total.get(text, 0.0) + chance * share
    return total


@pytest.mark.parametrize("distance", [0.3, 1.5, 4.0])
@pytest.mark.parametrize(("vocabulary", "longest"), [(2, 4), (3, 3), (4, 2)])
def test_what_a_block_commits_is_the_targets_text_exactly(vocabulary: int, longest: int, distance: float) -> None:
    """By enumeration of all windows, which end at any length; a committed text goes on by the target's chances."""
    trees = Trees(vocabulary + longest, vocabulary, longest, distance)
    chances = commits(trees)
    for text in itertools.product(range(vocabulary), repeat=longest + 1):
        target = np.prod([trees.p[text[:i]][text[i]] for i in range(longest + 1)])
        written = sum(
            chances.get(text[:n], 0.0) * np.prod([trees.p[text[:i]][text[i]] for i in range(n, longest + 1)])
            for n in range(1, longest + 2)
        )
        assert written == pytest.approx(target, abs=1e-12)


def test_the_function_draws_what_the_enumeration_says() -> None:
    """Counts of 20,000 draws for one window, against its outcomes."""
    trees = Trees(3, 3, 3, 1.5)
    window = max(trees.windows(), key=lambda found: len(found[0]))[0]
    p, q = rows(trees, window)
    generator, counts = torch.Generator().manual_seed(0), dict[Text, int]()
    for _ in range(20_000):
        accepted, bonus = confirm_block(p, q, window, generator)
        text = (*window[:accepted], bonus)
        counts[text] = counts.get(text, 0) + 1
    expected = outcomes(trees, window)
    assert set(counts) <= {text for text, chance in expected.items() if chance > 0}
    for text, chance in expected.items():
        assert counts.get(text, 0) / 20_000 == pytest.approx(chance, abs=0.02)


def rows(trees: Trees, window: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    prefixes = [tuple(window[:i]) for i in range(len(window) + 1)]
    p = torch.tensor(np.array([trees.p[prefix] for prefix in prefixes]), dtype=torch.float32)
    q = torch.tensor(np.array([trees.q[prefix] for prefix in prefixes[:-1]]), dtype=torch.float32)
    return p, q


def test_a_block_keeps_more_than_token_by_token() -> None:
    """Windows drawn from the verifier, each confirmed both ways."""
    luck, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    kept = {confirm_block: 0, confirm_by_token: 0}
    for _ in range(600):
        q = luck.dirichlet(np.ones(6), size=8)
        p = luck.dirichlet(np.ones(6), size=9)
        p[:8] = 0.6 * q + 0.4 * p[:8]
        window = [int(luck.choice(6, p=row)) for row in q]
        for confirm in kept:
            pair = torch.tensor(p, dtype=torch.float32), torch.tensor(q, dtype=torch.float32)
            kept[confirm] += confirm(*pair, window, generator)[0]
    assert kept[confirm_block] > 1.03 * kept[confirm_by_token]


def test_what_is_not_a_number_behind_a_refused_token_does_no_harm() -> None:
    p, q = torch.full((4, 4), 0.25), torch.full((3, 4), 0.25)
    p[0] = one_hot(3)
    p[2:] = torch.nan
    assert confirm_block(p, q, [1, 2, 2], GENERATOR) == (0, 3)
