"""Attention of the nodes of a tree: each sees the text before the tree and its own path, as far as its window goes."""

import torch
from helpers import interpreted  # noqa: F401  # first: it decides how kernels are compiled
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quasar_core.kernels.triton import attention
from quasar_core.kernels.triton.shares import attention_workspace
from quasar_core.models.cuda.graphs import LONGEST_TREE, describe_tree

CPU = torch.device("cpu")
HEADS, SIZE = 2, 16


@st.composite
def trees(draw: st.DrawFn) -> list[int]:
    """Parents of up to as many nodes as pass at once."""
    count = draw(st.integers(1, LONGEST_TREE))
    return [-1, *(draw(st.integers(0, node - 1)) for node in range(1, count))]


def seen_of(node: int, parents: list[int], start: int, window: int | None) -> list[int]:
    """Places in the cache of what a node sees: the last of its path and of the text before it."""
    path = [node]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    places = [*range(start), *(start + before for before in path)]
    return places[-window:] if window else places


def exact(queries: torch.Tensor, states: torch.Tensor, seen: list[list[int]]) -> torch.Tensor:
    """In float64, of each node over its places alone."""
    outputs = []
    for row, places in zip(queries.double(), seen, strict=True):
        keys, values = states[:, :, places].double()
        weights = (keys @ row[:, :, None] / SIZE**0.5).softmax(1)
        outputs.append((weights * values).sum(1).flatten())
    return torch.stack(outputs)


@settings(max_examples=12, deadline=None)
@given(
    trees(), st.sampled_from([0, 1, 5, 60, 127]), st.sampled_from([None, 1, 2, 5, 60]), st.integers(0, 3), st.booleans()
)
@example([-1, *range(LONGEST_TREE - 1)], 60, 3, 0, False)  # a path longer than its window
@example([-1] + [0] * (LONGEST_TREE - 1), 60, 1, 0, True)
def test_a_node_sees_its_path_as_far_as_its_window(
    parents: list[int], start: int, window: int | None, filled: int, merges: bool
) -> None:
    filled = min(filled, LONGEST_TREE - len(parents))
    count = len(parents) + filled
    bound = start + count + 9
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, HEADS, bound, SIZE, generator=generator).half()
    states[:, :, start + count :] = torch.nan  # nothing is read that was not written
    queries = torch.randn(count, HEADS, SIZE, generator=generator).half()
    depths, families = torch.tensor(describe_tree(parents, filled)).chunk(2)
    workspace = attention_workspace(CPU, count, HEADS, SIZE, bound).fill_(torch.nan)
    out = torch.full((count, HEADS * SIZE), torch.nan, dtype=torch.float16)
    where = torch.tensor([start]), window, workspace, out, bound
    attention.attend(queries, *states, *where, tree=(depths, families), merges=merges)
    alone = [-1] * filled  # a filled node sees the text and itself
    seen = [seen_of(node, [*parents, *alone], start, window) for node in range(count)]
    torch.testing.assert_close(out.double(), exact(queries, states, seen), rtol=0, atol=4e-3)


def test_as_many_nodes_pass_at_once_as_attention_takes() -> None:
    assert attention.MOST_NODES.value >= LONGEST_TREE
