"""Trees: which branches pay, where a pass's own tokens lead, and that no text depends on any of it."""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import CASES, CPU, random_tokens, save_model
from helpers.quantized_decoder import quantize_layers
from helpers.sampled_text import IMPOSSIBLE, PROMPT, SUSPICIOUS, TARGET, p_of_transitions
from helpers.tiny_models import TreeTable, make_pair
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar_core.config import GenerationConfig, SamplingConfig
from quasar_core.decode.costs.pass_costs import PassCost
from quasar_core.decode.engine import Engine
from quasar_core.decode.generator import Generator
from quasar_core.decode.policy.lengths import AdaptiveLength, FixedLength, WindowPolicy
from quasar_core.decode.policy.trees import Branch, BranchChances, Branching, Shape, Tree, choose_shape
from quasar_core.draft.base import NO_DRAFT, Draft, Drafter, Piece
from quasar_core.draft.ngram import NgramDrafter
from quasar_core.models import loading
from quasar_core.models.base import choose_best
from quasar_core.models.decoder.cache import DecoderCache
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.weights.lean_weights import attach_verifier, load_target

DRAFT = Draft((5, 6, 7), (Piece("ngram", 2, 2), Piece("recycle", 0, 1)))
TREE = Tree(4, DRAFT, (Branch(0, 8, 1), Branch(2, 9, 2)))
FLAT, STEEP = PassCost((1, 64), (1.0, 1.0)), PassCost((1, 64), (1.0, 64.0))


def test_nodes_come_draft_first() -> None:
    assert TREE.tokens == [4, 5, 6, 7, 8, 9]
    assert TREE.parents == [-1, 0, 1, 2, 0, 2]
    assert list(TREE.paths()) == [[0, 1, 2, 3], [0, 4], [0, 1, 2, 5]]


@pytest.mark.parametrize(
    ("chosen", "path"),
    [
        ([1, 0, 0, 0, 0, 0], []),
        ([5, 1, 0, 0, 0, 0], [1]),
        ([5, 6, 7, 1, 0, 0], [1, 2, 3]),
        ([8, 6, 7, 1, 3, 0], [4]),
        ([5, 6, 9, 1, 0, 8], [1, 2, 5]),
        ([9, 6, 9, 1, 0, 8], []),
    ],
)
def test_the_pass_leads_through_the_tree(chosen: list[int], path: list[int]) -> None:
    assert TREE.follow(chosen) == path


def test_a_step_is_recorded_with_its_path_first() -> None:
    assert TREE.as_draft([1, 2, 5]).tokens == (5, 6, 9, 7, 8)
    assert TREE.as_draft([]).tokens == (5, 6, 7, 8, 9)
    ends = [path for path in ([], [1], [1, 2], [1, 2, 3], [4], [1, 2, 5]) if TREE.refuses_behind(path)]
    assert ends == [[], [1], [1, 2]]


def test_pieces_begin_with_the_path() -> None:
    first, second, branches = (
        Piece("ngram", 2, 2),
        Piece("recycle", 0, 1),
        [Piece("branch", 1, 1), Piece("branch", 2, 1)],
    )
    assert TREE.pieces([1, 2, 3]) == [first, second, *branches]
    assert TREE.pieces([4]) == [branches[0], first, second, branches[1]]
    assert TREE.pieces([1]) == [Piece("ngram", 2, 1), Piece("ngram", 2, 1), second, *branches]
    assert TREE.pieces([1, 2, 5]) == [first, branches[1], second, branches[0]]


def test_chances_are_learned_where_a_branch_was_reached() -> None:
    chances = BranchChances()
    before = chances(1), chances(2)
    chances.learn(TREE, [4])
    assert chances(1) > before[0]
    assert chances(2) == before[1]
    for _ in range(200):
        chances.learn(TREE, [1, 2])
    assert chances(1) < 0.05
    assert chances(2) < 0.05


@given(
    chances=st.lists(st.floats(0.01, 1.0), max_size=3),
    likely=st.lists(st.lists(st.integers(-1, 9), max_size=2, unique=True), min_size=4, max_size=4),
    survivals=st.lists(st.floats(0.1, 1.0), max_size=2),
    slope=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    step=st.sampled_from([0.0, 0.5]),
    room=st.integers(0, 3),
)
@settings(deadline=None, derandomize=True, max_examples=120)
def test_no_other_tree_is_expected_to_be_faster(
    chances: list[float], likely: list[list[int]], survivals: list[float], slope: float, step: float, room: int
) -> None:
    """Against every subtree that has its nodes' parents, is no smaller than the draft's own pass, and has room."""
    draft = Draft.of(range(10, 10 + len(chances)), "ngram", 1)
    cost = PassCost((1, 4, 5, 64), (1.0, 1.0 + 3 * slope, 1.0 + 4 * slope + step, 1.0 + 63 * slope + step))
    room += 1 + len(survivals) + len(chances)
    chance_of = BranchChances()
    chance_of.learn(Tree(0, NO_DRAFT, (Branch(0, 1, 1),)), [1])  # a rank that is more often right
    found = choose_shape(draft, chances, likely[: len(chances) + 1], chance_of, cost, room, survivals)
    before = [math.prod(survivals[:count]) for count in range(len(survivals) + 1)]

    def rate(length: int, branches: Sequence[Branch]) -> float:
        reached = [before[-1] * math.prod(chances[:count]) for count in range(length + 1)]
        gained = sum(reached[branch.parent] * chance_of(branch.rank) for branch in branches)
        return (sum(before[:-1]) + sum(reached) + gained) / cost(len(survivals) + 1 + length + len(branches))

    nodes = 1 + len(survivals) + found.length + len(found.branches)
    assert 1 + len(survivals) + len(chances) <= nodes <= room
    assert all(branch.parent <= found.length for branch in found.branches)
    others = every_shape(likely, len(chances), room - 1 - len(survivals))
    assert rate(found.length, found.branches) >= max(rate(*other) for other in others) - 1e-9


def every_shape(likely: Sequence[Sequence[int]], longest: int, room: int) -> Iterator[tuple[int, Sequence[Branch]]]:
    """Every part of a draft of `longest` tokens with every set of branches: `longest` to `room` nodes."""
    for length in range(longest + 1):
        rows = enumerate(likely[: length + 1])
        beside = [Branch(node, token, rank) for node, row in rows for rank, token in enumerate(row) if token >= 0]
        for count in range(longest - length, room - length + 1):
            yield from ((length, branches) for branches in itertools.combinations(beside, count))


def test_the_end_of_a_doubtful_draft_makes_room_for_branches() -> None:
    likely = [[5, 1], [6, 2], [7, 3], [1, 2]]
    chances = [0.9, 0.05, 0.9]
    found = choose_shape(DRAFT, chances, likely, BranchChances(), FLAT, 4)
    assert found == Shape(1, (Branch(0, 1, 1), Branch(1, 2, 1)))
    assert choose_shape(DRAFT, [0.9, 0.9, 0.9], likely, BranchChances(), FLAT, 4) == Shape(3, ())


def test_a_drafts_own_token_is_no_branch_and_steep_costs_leave_none() -> None:
    likely = [[5, 1], [6, 2], [7, 3], [1, 2]]
    found = choose_shape(DRAFT, [0.9, 0.8, 0.7], likely, BranchChances(), FLAT, 10)
    assert found.length == 3
    assert {(branch.parent, branch.token) for branch in found.branches} == {(0, 1), (1, 2), (2, 3), (3, 1), (3, 2)}
    assert choose_shape(DRAFT, [0.9, 0.8, 0.7], likely, BranchChances(), STEEP, 10) == Shape(3, ())


def test_a_window_stays_and_has_no_branches_beside_it() -> None:
    length = AdaptiveLength(FLAT)
    drafter = Likely([[5, 1], [6, 2], [7, 3], [1, 2]])
    window, survivals = [8, 9, 8], [0.5, 0.1, 0.1]
    tree = Branching(length, 6).grow(4, DRAFT, drafter, 9, 99, window, survivals)
    assert tree.tokens[:4] == [4, *window]
    assert len(tree.tokens) == 7  # as many as there are, where the room is less
    tree = Branching(length, 9).grow(4, DRAFT, drafter, 9, 99, window, survivals)
    assert tree.tokens[:4] == [4, *window]
    assert len(tree.tokens) == 9
    assert min(branch.parent for branch in tree.branches) >= 3
    tree = Branching(length, 9).grow(4, DRAFT, drafter, 1, 99, window, survivals)
    assert {branch.parent for branch in tree.branches} == {3}


class Likely(Drafter):
    """Knows some tokens."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    def alternatives(self, draft: Sequence[int]) -> list[list[int]]:
        return self.rows


# In the engine


class Forced(Branching):
    """Branches whatever they cost: the likeliest of another model, and tokens at random, behind any node."""

    def __init__(self, seed: int, model: Any, guess: Callable[[Sequence[int]], list[int]]) -> None:
        self.dice, self.guess = random.Random(seed), guess
        self.longest, self.vocabulary = model.longest_tree, model.vocab_size
        self.gained = self.trees = 0

    def grow(self, last: int, draft: Draft, drafter: Drafter, reach: int, room: int) -> Tree:
        nodes = range(min(len(draft.tokens) + 1, reach))
        wanted = min(self.dice.randint(0, 6), self.longest - 1 - len(draft.tokens), room - 1 - len(draft.tokens))
        branches = dict[tuple[int, int], Branch]()
        for _ in range(max(wanted, 0)):
            node = self.dice.choice(nodes)
            text = [*drafter.context, *draft.tokens[:node]]  # type: ignore[attr-defined]
            token = self.dice.choice([*self.guess(text), self.dice.randrange(self.vocabulary)])
            if token not in draft.tokens[node : node + 1]:
                branches[node, token] = Branch(node, token, 0)
        return Tree(last, draft, tuple(branches.values()))

    def learn(self, tree: Tree, path: Sequence[int], drafting_s: float = 0.0, pass_s: float | None = None) -> None:
        self.trees += 1
        self.gained += any(node > len(tree.draft.tokens) for node in path)


def run(pair: Any, config: GenerationConfig, branching: Branching | None, prompt: Sequence[int]) -> Engine:
    """An engine that has come to its end, which has checked its cache and its drafter after every step."""
    longest = len(prompt) + config.max_new_tokens
    drafts = 0 if config.draft == "none" else int(config.num_draft_tokens)
    window = WindowPolicy(int(config.window) if config.verify == "exact" else 1)
    cache, drafter = pair.new_cache(longest), NgramDrafter()
    engine = Engine(pair, cache, config, drafter, FixedLength(drafts), window, longest, branching=branching)
    engine.prefill(prompt)
    while engine.committed < longest and engine.tokens[-1] not in engine.eos_ids:
        engine.step()
        assert cache.length == len(engine.tokens) - 1
        assert drafter.context == engine.tokens
    return engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("verify", ["full", "exact", "quantized"])
@pytest.mark.usefixtures("cpp_pass")
def test_in_cpp_trees_change_no_text(tmp_path: Path, verify: str, dtype: torch.dtype) -> None:
    """Whatever the branches, drafts and windows; texts end early now and then."""
    save_model(tmp_path, *CASES["qwen3, listed windows, biases"])
    target = load_target(tmp_path, CPU, dtype)
    verifier = attach_verifier(target, quantize_layers(tmp_path, tmp_path / "verifier", lambda name: 4), "vnni")
    loading.attach(target), loading.attach(verifier)
    pair, dice, gained = make_pair(target, verifier, dtype=dtype), random.Random(3), 0
    guess = guesser(verifier if verify == "quantized" else target)
    for number in range(8):
        prompt = (random_tokens(dice.randint(1, 12)) * 3)[: dice.randint(1, 30)]
        plain = GenerationConfig(30, "quantized" if verify == "quantized" else "full", "none")
        pair.eos_ids = frozenset()
        expected = run(pair, plain, None, prompt).tokens
        pair.eos_ids = frozenset([expected[-9]] if number % 3 == 2 else [])
        options = {"num_draft_tokens": dice.choice([1, 3, 8]), "window": dice.choice([1, 3, 9])}
        branching = Forced(number, target, guess)
        found = run(pair, GenerationConfig(30, verify, **options), branching, prompt).tokens  # type: ignore[arg-type]
        ends = [place for place in range(len(prompt), len(expected)) if expected[place] in pair.eos_ids]
        assert found == expected[: ends[0] + 1 if ends else None]
        gained += branching.gained
    assert gained > 10


def guesser(model: LeanDecoder) -> Callable[[Sequence[int]], list[int]]:
    """What the model itself would say, so that branches are often right."""

    def guess(text: Sequence[int]) -> list[int]:
        return [choose_best(model.forward(text, model.new_cache(len(text)))[-1:]).tokens[0]]

    return guess


def test_a_broken_walk_through_the_tree_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path, "Llama", {})
    target = load_target(tmp_path, CPU, torch.float32)
    pair, prompt = make_pair(target), random_tokens(12)
    expected = run(pair, GenerationConfig(30, "full", "none"), None, prompt).tokens
    monkeypatch.setattr(target, "new_cache", lambda capacity: Forgetful(target, capacity))
    branching = Forced(0, target, guesser(target))
    found = run(pair, GenerationConfig(30, "full", num_draft_tokens=3), branching, prompt).tokens
    assert found != expected


class Forgetful(DecoderCache):
    """Leaves keys and values where the tree had them."""

    def __init__(self, model: LeanDecoder, capacity: int) -> None:
        super().__init__(model.config.blocks, capacity, CPU, torch.float32)

    def keep(self, start: int, nodes: Sequence[int]) -> None:
        self.rollback(start + len(nodes))


def sampled(verify: str) -> list[int]:
    target, verifier = TreeTable(5, seed=0), TreeTable(5, seed=0)
    verifier.table = TARGET.disturbed(0.5).table
    config = GenerationConfig(1500, verify, window=3, num_draft_tokens=2, sampling=SamplingConfig(1.0))  # type: ignore[arg-type]
    pair = make_pair(target, verifier, max_context=2000)
    branching = Forced(1, target, lambda text: target.table[text[-2], text[-1]].topk(2).indices.tolist())
    engine = run(pair, config, branching, PROMPT)
    assert branching.gained > 100
    return engine.tokens[len(PROMPT) :]


@pytest.mark.parametrize("verify", ["full", "exact"])
def test_sampling_over_trees_has_plain_samplings_transitions(verify: str) -> None:
    assert p_of_transitions(sampled(verify)) > SUSPICIOUS


def test_a_walk_that_prefers_branches_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes to the first child, whatever was drawn."""
    monkeypatch.setattr(Tree, "follow", lambda tree, chosen: [len(tree.draft.tokens) + 1] if tree.branches else [])
    assert p_of_transitions(sampled("full")) < IMPOSSIBLE


class Flat:
    """In the place of measured costs: a pass takes a second, whatever its tokens."""

    remembered = False
    cost = FLAT


def adaptive(pair: Any, texts: Sequence[Sequence[int]], **options: Any) -> list[Any]:
    """Answers of one generator whose clock goes a second at each look."""
    pair.measured = {"target": Flat(), "verifier": Flat()}
    ticks = itertools.count()
    generator = Generator(pair, GenerationConfig(60, draft="recycle", **options), now=lambda: float(next(ticks)))
    return [generator.generate(text) for text in texts]


def branches_of(results: Sequence[Any]) -> int:
    """How many were verified."""
    pieces = [piece for result in results for step in result.stats.step_log for piece in step.pieces]
    return sum(piece.length for piece in pieces if piece.source == "branch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("verify", ["full", "exact"])
@pytest.mark.usefixtures("cpp_pass")
def test_where_rows_cost_nothing_branches_are_tried_and_change_no_text(
    tmp_path: Path, verify: Any, dtype: torch.dtype
) -> None:
    save_model(tmp_path, *CASES["qwen3"])
    target = load_target(tmp_path, CPU, dtype)
    verifier = attach_verifier(target, quantize_layers(tmp_path, tmp_path / "verifier", lambda name: 4), "vnni")
    loading.attach(target), loading.attach(verifier)
    pair, texts = make_pair(target, verifier, dtype=dtype), [random_tokens(9), random_tokens(20), random_tokens(9)]
    plain = Generator(pair, GenerationConfig(60, "full", "none"))
    expected = [plain.generate(text).token_ids for text in texts]
    found = adaptive(pair, texts, verify=verify)
    assert [result.token_ids for result in found] == expected
    assert branches_of(found) > 10
    for options in ({"trees": False}, {"sampling": SamplingConfig(repetition_penalty=1.01)}):
        assert branches_of(adaptive(pair, texts, verify=verify, **options)) == 0


@pytest.mark.usefixtures("cpp_pass")
def test_sampled_text_over_trees_is_plain_samplings(tmp_path: Path) -> None:
    save_model(tmp_path, *CASES["qwen3"])
    target = load_target(tmp_path, CPU, torch.float32)
    loading.attach(target)
    pair, sampling, texts = make_pair(target), SamplingConfig(0.02, seed=5), [random_tokens(9)] * 3
    plain = Generator(pair, GenerationConfig(60, "full", "none", sampling=sampling))
    found = adaptive(pair, texts, verify="full", sampling=sampling)
    assert [result.token_ids for result in found] == [plain.generate(text).token_ids for text in texts]
    assert branches_of(found) > 10
