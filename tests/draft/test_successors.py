"""Known successors against a count by hand; their file, whole and damaged; drafts from them."""

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from quasar_core.draft.base import Draft, Piece
from quasar_core.draft.successor_file import read_successors, write_successors
from quasar_core.draft.successors import ODDS, WIDTH, KnownSuccessors, SuccessorsDrafter, count_successors, key_of
from quasar_core.errors import QuasarError
from quasar_core.store.folders import SUCCESSORS, own_files

SIZE = 6


def random_rows(seed: int, texts: int, length: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Texts, the likeliest successors of each of their tokens, and descending probabilities."""
    dice = np.random.default_rng(seed)
    best = np.argsort(dice.random((texts, length, SIZE)), axis=-1)[..., :width].astype(np.int64)
    odds = -np.sort(-dice.dirichlet(np.ones(SIZE), (texts, length)), axis=-1)[..., :width]
    return dice.integers(0, SIZE, (texts, length)), best, odds.astype(np.float32)


def by_hand(texts: np.ndarray, best: np.ndarray, odds: np.ndarray) -> dict[tuple[int, ...], dict[int, float]]:
    """Of every context of one to three tokens the mean probability of each token."""
    sums: dict[tuple[int, ...], dict[int, float]] = defaultdict(lambda: defaultdict(float))
    counts: dict[tuple[int, ...], int] = defaultdict(int)
    for text, rows, chances in zip(texts.tolist(), best.tolist(), odds.tolist(), strict=True):
        for end in range(1, len(text) + 1):
            for size in range(1, min(3, end) + 1):
                context = tuple(text[end - size : end])
                counts[context] += 1
                for token, chance in zip(rows[end - 1], chances[end - 1], strict=True):
                    sums[context][token] += chance
    return {context: {t: s / counts[context] for t, s in found.items()} for context, found in sums.items()}


@given(seed=st.integers(0, 10_000), texts=st.integers(1, 4), length=st.integers(1, 12), width=st.integers(1, SIZE))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_counts_are_those_of_a_table_by_hand(seed: int, texts: int, length: int, width: int) -> None:
    rows = random_rows(seed, texts, length, width)
    known, expected = count_successors(*rows), by_hand(*rows)
    assert len(known) == len(expected)
    for context, chances in expected.items():
        size, tokens, odds = known.after(context)
        assert size == len(context)
        assert tokens == sorted(chances, key=lambda token: (-chances[token], token))[:WIDTH] + [-1] * (
            WIDTH - len(chances)
        ) or [chances.get(token, 0.0) for token in tokens] == pytest.approx(
            sorted(chances.values(), reverse=True) + [0.0] * (WIDTH - len(chances))
        )
        assert odds == [round(ODDS * chances.get(token, 0.0)) for token in tokens]


def test_a_longer_context_goes_before_a_shorter_one() -> None:
    known = count_successors(*random_rows(1, 3, 9, 4))
    assert known.after([0, 1, 2, 99])[0] == 0
    text = random_rows(1, 3, 9, 4)[0][0].tolist()
    assert [known.after([99, *text[:size]])[0] for size in (1, 2, 3)] == [1, 2, 3]
    assert known.after(text[:3], longest=1) == known.after(text[2:3])
    assert known.after([]) == (0, [], [])


@pytest.mark.parametrize("most", [3, SIZE, 20])
def test_a_bound_keeps_single_tokens_and_what_is_frequent(most: int) -> None:
    texts, best, odds = random_rows(2, 4, 30, 4)
    known = count_successors(texts, best, odds, most)
    assert len(known) == most
    single = [known.after([token])[0] for token in range(SIZE)]
    assert sum(single) == min(most, SIZE)
    counts: dict[int, int] = defaultdict(int)
    for text in texts.tolist():
        for size in (2, 3):
            for end in range(size, len(text) + 1):
                counts[key_of(text[end - size : end])] += 1
    kept = [counts[key] for key in known.contexts.tolist() if key in counts]
    left = [count for key, count in counts.items() if key not in known.contexts]
    assert min(kept, default=9) >= max(left) or most <= SIZE


def known_of(rows: dict[tuple[int, ...], list[tuple[int, int]]]) -> KnownSuccessors:
    """Successors and their odds by context."""
    ordered = sorted(rows.items(), key=lambda item: key_of(item[0]))
    padded = [[*row, *[(-1, 0)] * (WIDTH - len(row))] for _, row in ordered]
    contexts = np.array([key_of(context) for context, _ in ordered], np.int64)
    both = np.array(padded)
    return KnownSuccessors(contexts, both[..., 0].astype(np.int32), both[..., 1].astype(np.uint8))


KNOWN = known_of(
    {(1,): [(2, 240), (3, 10)], (2,): [(3, 60)], (1, 2): [(4, 150), (5, 90)], (1, 2, 4): [(6, 255)], (6,): [(6, 20)]}
)


def test_a_chain_goes_from_best_to_best_until_it_is_unlikely() -> None:
    drafter = SuccessorsDrafter(KNOWN)
    drafter.observe([9, 1])
    assert drafter.propose(3).tokens == (2, 4, 6)
    assert drafter.propose(9) == Draft(
        (2, 4, 6, 6, 6),
        (
            Piece("successors", 7, 1),
            Piece("successors", 4, 1),
            Piece("successors", 7, 1),
            Piece("successors", 0, 2),
        ),
    )
    assert drafter.propose(1, [2]).tokens == (4,)
    assert drafter.propose(4, [7]) == Draft()
    drafter.forget(1)
    assert drafter.propose(4) == Draft()


def test_alternatives_are_the_rows_along_a_draft() -> None:
    drafter = SuccessorsDrafter(KNOWN)
    drafter.observe([1])
    rows = drafter.alternatives([2, 8])
    assert [row[:2] for row in rows] == [[2, 3], [4, 5], []]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write_successors(tmp_path, KNOWN, "self")
    found = read_successors(tmp_path, 7)
    assert found is not None
    for name in ("contexts", "tokens", "odds"):
        assert (getattr(found, name) == getattr(KNOWN, name)).all()
    assert not list(tmp_path.glob("*.safetensors"))  # which loaders read as weights
    assert own_files(tmp_path) == [SUCCESSORS] == [path.name]
    assert read_successors(tmp_path / "elsewhere", 7) is None


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_a_file_is_read_once_as_long_as_it_is_the_same(tmp_path: Path) -> None:
    known = count_successors(*random_rows(1, 2, 9, 3))
    write_successors(tmp_path, known, "text")
    first = read_successors(tmp_path, SIZE)
    assert read_successors(tmp_path, SIZE) is first
    other = count_successors(*random_rows(2, 2, 9, 3))
    write_successors(tmp_path, other, "text")
    os.utime(tmp_path / SUCCESSORS, ns=(0, 0))
    found = read_successors(tmp_path, SIZE)
    assert found is not None
    assert np.array_equal(found.odds, other.odds)
    assert found is not first


def test_whoever_reads_the_folder_reads_the_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    path = write_successors(tmp_path, known_of({(3,): [(4, 128)]}), "some text")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def damage(name: str, tensors: dict[str, np.ndarray]) -> None:
    if name == "a tensor is missing":
        del tensors["odds"]
    if name == "another type":
        tensors["tokens"] = tensors["tokens"].astype(np.int64)
    if name == "contexts out of order":
        tensors["contexts"] = tensors["contexts"][::-1].copy()
    if name == "other lengths":
        tensors["odds"] = tensors["odds"][:-1].copy()
    if name == "a token beyond the vocabulary":
        tensors["tokens"][0, 0] = 7


DAMAGES: Sequence[str] = (
    "a tensor is missing",
    "another type",
    "contexts out of order",
    "other lengths",
    "a token beyond the vocabulary",
)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_file_of_something_else_is_refused(tmp_path: Path, name: str) -> None:
    path = write_successors(tmp_path, KNOWN, "self")
    tensors = load_file(path)
    damage(name, tensors)
    save_file(tensors, path)
    with pytest.raises(QuasarError, match=str(path)):
        read_successors(tmp_path, 7)


def test_a_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    path = write_successors(tmp_path, KNOWN, "self")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(QuasarError, match="cannot be read"):
        read_successors(tmp_path, 7)
