"""Attention of a pass behind long texts: chunks of positions are joined to what PyTorch gives, on any threads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_cases import CPU, FLOAT, random_tokens, save_model

from quasar_core.models import loading
from quasar_core.models.decoder.lean_decoder import LeanDecoder
from quasar_core.models.verifier.narrow import narrowed
from quasar_core.models.weights.lean_weights import load_target

pytestmark = pytest.mark.usefixtures("cpp_pass")

ROOM = 64
LENGTHS = [500, 512, 700, 1100, 1500, 9000]  # around the first chunks' ends, and where chunks are longer
WINDOW = 600
THREE = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "three heads": ("Llama", THREE),
    "one head": ("Llama", {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16}),
    "windows": ("Mistral", {**THREE, "sliding_window": WINDOW}),
    "soft caps": ("Gemma2", {**THREE, "sliding_window": WINDOW}),
    "sinks": ("Llama", THREE),
    "heads of 80": ("Llama", {**THREE, "num_key_value_heads": 2, "head_dim": 80}),
}


def load(folder: Path, kind: str, dtype: torch.dtype) -> LeanDecoder:
    name, options = KINDS[kind]
    save_model(folder, name, {**options, "num_hidden_layers": 2, "max_position_embeddings": 16384})
    decoder = load_target(folder, CPU, dtype)
    note = loading.attach(decoder)
    assert decoder.fast is not None, note
    return narrowed(decoder, 5, WINDOW) if kind == "sinks" else decoder


def behind(decoder: LeanDecoder, length: int) -> Any:
    """A cache that holds random keys and values of so many positions."""
    cache = decoder.new_cache(length + ROOM)
    generator = torch.Generator().manual_seed(length)
    for states in cache.layers:
        states.copy_(torch.randn(states.shape, generator=generator))
    cache.advance(length)
    return cache


def passed(decoder: LeanDecoder, cache: Any, tokens: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    """Logits of tokens that pass in pieces; then the cache is as before."""
    length, parts, begin = cache.length, [], 0
    for size in sizes:
        parts.append(decoder.forward(tokens[begin : begin + size], cache))
        begin += size
    cache.rollback(length)
    return torch.cat(parts)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_joined_to_what_pytorch_gives(tmp_path: Path, kind: str) -> None:
    decoder, tokens = load(tmp_path, kind, FLOAT), random_tokens(21)
    torch.set_num_threads(2)
    for length in LENGTHS:
        cache = behind(decoder, length)
        logits = passed(decoder, cache, tokens, [21])
        expected = decoder.plain_logits(tokens, cache)
        torch.testing.assert_close(logits, expected, atol=2e-5 * float(expected.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_depends_on_the_threads_or_on_the_tokens_beside(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """Not a bit of any token's logits, wherever a chunk ends."""
    decoder, tokens = load(tmp_path, kind, dtype), random_tokens(21)
    for length in LENGTHS:
        cache = behind(decoder, length)
        torch.set_num_threads(1)
        expected = passed(decoder, cache, tokens, [1] * 21)
        for threads, sizes in ((1, [21]), (2, [4, 1, 16]), (3, [21]), (7, [8, 13])):
            torch.set_num_threads(threads)
            assert torch.equal(passed(decoder, cache, tokens, sizes), expected), (length, threads)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("kind", KINDS)
def test_in_tiles_nothing_depends_on_the_tokens_beside(tmp_path: Path, kind: str) -> None:
    """In bfloat16, of up to 84 queries of a head; and they are as near to float32's as PyTorch's operations are."""
    decoder, tokens = load(tmp_path, kind, torch.bfloat16), random_tokens(21)
    torch.set_num_threads(2)
    cache = behind(decoder, 700)
    logits = passed(decoder, cache, tokens, [1] * 21)
    for sizes in ([21], [4, 1, 16]):
        assert torch.equal(passed(decoder, cache, tokens, sizes), logits), sizes
    exact = load(tmp_path, kind, FLOAT)
    expected, plain = exact.plain_logits(tokens, behind(exact, 700)), decoder.plain_logits(tokens, cache)
    assert (logits - expected).norm() <= 1.1 * (plain - expected).norm()


@pytest.mark.parametrize("kind", ["three heads", "sinks"])
def test_a_node_of_a_tree_sees_what_its_path_would(tmp_path: Path, kind: str) -> None:
    """A path may cross from one chunk to the next."""
    decoder, nodes, parents = load(tmp_path, kind, torch.bfloat16), random_tokens(7), [-1, 0, 1, 0, 3, 4, 1]
    for length in (509, 511, 1100):
        cache = behind(decoder, length)
        torch.set_num_threads(2)
        tree = decoder.forward_tree(nodes, parents, cache)
        cache.rollback(length)
        for node in range(len(nodes)):
            path = [node]
            while parents[path[0]] >= 0:
                path.insert(0, parents[path[0]])
            row = passed(decoder, cache, [nodes[i] for i in path], [len(path)])[-1]
            assert torch.equal(row, tree[node]), (length, node)
